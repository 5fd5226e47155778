"""An exchange without the interpreter, for as long as nothing is out of the ordinary.

Attention sends a layer's rows to all instances that it asks (``ask``), then takes and adds their replies (``collect``);
an expert instance answers frame after frame (``serve``). A frame that is not exactly what was expected is left where it
lies: Python has the rules for it (services/attention/attempts.py, services/experts/server.py). Between the weights of
one layer and the next the interpreter is no longer in the caches, and takes longer than all that is done here.
"""
# ruff: noqa: ANN001, ANN201, ANN202 - numba infers the types

import numpy as np
from numba import types

from shared.activation import PARTS
from shared.kernels import native
from shared.kernels.cpu_answer import answer, gather
from shared.kernels.jit import FP32, I64, helper, kernel, view1
from shared.scheduling.kernels import DONE
from shared.transport.base import HEADER, HEADER_BYTES, MAGIC, WIRE_VERSION, FrameKind
from shared.transport.ucp import ADDRESS, FRAME_TAG, IN_PROGRESS, STATUS, busy, clock, receive_again, send, wait

MOST_ROWS = 64
"""Of an exchange that goes this way; with more the interpreter does not count."""
ADDED, NOTHING, STRANGE, SENT_NOTHING, REFUSED = range(5)
"""What ``collect`` returns: all is done, no reply has come yet, or replies are there for Python. And ``march``."""
NEITHER, ASK, COLLECT = range(3)
"""What follows an entry of a score."""
MESH, SENDER, PLACEMENT, INSTANCE, POLICY, COLUMNS, TOP_K = range(7)
"""What ``serve`` is told of an instance and its placement, int64 [7]."""
ANSWERS, PARTS_MADE, BYTES_IN, BYTES_OUT, BUSY_NS = range(5)
"""What it counts, int64 [5]."""
_MAGIC, _BYTES = int.from_bytes(MAGIC, "little"), np.uint8
_DISPATCH, _COMBINE, _PART = int(FrameKind.DISPATCH), int(FrameKind.COMBINE), PARTS.itemsize
_WORDS, _ROUNDING = HEADER_BYTES // 8, 64


@helper
def _header(address):
    return view1(address, 1, HEADER)[0]


@helper
def _copy_header(source, target):
    given, taken = view1(source, _WORDS, I64), view1(target, _WORDS, I64)
    for i in range(_WORDS):
        taken[i] = given[i]


@helper
def _body(meta_bytes):
    """See ``body_offset``."""
    return (HEADER_BYTES + meta_bytes + _ROUNDING - 1) // _ROUNDING * _ROUNDING


@helper
def _fits(header, kind, mesh, columns, capacity):
    """Whether a received frame is of this kind, with fp32 rows of this model, without flags, and not too long."""
    ours = header.magic == _MAGIC and header.version == WIRE_VERSION and header.mesh == mesh
    plain = header.kind == kind and header.flags == 0 and header.dtype == 0 and header.columns == columns
    return ours and plain and _body(header.meta_bytes) + 4 * header.rows * header.columns <= capacity


@helper
def _find(table, sender):
    """The row of a table that begins with an incarnation, or -1."""
    for i in range(len(table)):
        if np.uint64(table[i, 0]) == sender:
            return i
    return -1


@kernel
def ask(api, lines, frame, header, x, rows, columns, sequence):
    """Send rows fp32 [rows, columns] to all of ``lines``; False, having done nothing, while UCX holds something to one.

    Args:
        lines: int64 [n, 2], see ``Lane.line``.
        frame, header, x: addresses of the frame that is sent, of its header but for rows and sequence, and of the rows.
    """
    for i in range(len(lines)):
        if busy(api, lines[i, 1]):
            return False
    _copy_header(header, frame)
    asked, size = _header(frame), rows * columns
    asked.rows, asked.sequence = rows, sequence
    source, target = view1(x, size, FP32), view1(frame + HEADER_BYTES, size, FP32)
    for i in range(size):
        target[i] = source[i]
    for i in range(len(lines)):
        view1(lines[i, 1], 1, I64)[0] = send(api, lines[i, 0], frame, HEADER_BYTES + 4 * size, FRAME_TAG)
    return True


@helper
def _judge(receives, count, capacity, frame, expected, replies):
    """Arrange all replies for ``gather``; False when what has come is anything else."""
    asked, found, digest = _header(frame), 0, np.uint64(0)
    for i in range(count):
        if receives[i, STATUS] == IN_PROGRESS:
            continue
        address = receives[i, ADDRESS]
        reply = _header(address)
        if receives[i, STATUS] or not _fits(reply, _COMBINE, asked.mesh, asked.columns, capacity):
            return False
        who = _find(expected, reply.sender)
        if who < 0 or reply.sequence != asked.sequence or reply.attempt or _PART * reply.rows > reply.meta_bytes:
            return False
        for other in range(found):
            if replies[other, 0] == expected[who, 1] or reply.digest != digest:
                return False
        digest = reply.digest
        rows, parts = address + _body(reply.meta_bytes), np.int64(reply.rows)
        replies[found] = expected[who, 1], address + HEADER_BYTES, rows, parts
        found += 1
    return found == len(replies)


@kernel
def collect(api, worker, files, receives, count, capacity, woken, times, frame, expected, homes, chosen, x):
    """Wait for the replies to the frame at an address, and add them to the rows at ``x``; returns ADDED, ...

    Args:
        receives, count, times: see ``ucp.wait``; capacity: bytes of each receive.
        expected: int64 [n, 2], incarnation of each instance that was asked, and its bit.
        homes, chosen: see ``Kernels.gather``.
    """
    done = wait(api, worker, files, receives, count, np.zeros(0, np.int64), woken, len(expected), times)
    if done <= 0:
        return NOTHING
    replies, asked = np.empty((len(expected), 4), np.int64), _header(frame)
    if done != len(expected) or not _judge(receives, count, capacity, frame, expected, replies):
        return STRANGE
    if gather(x, len(chosen), np.int64(asked.columns), replies, homes, chosen):
        return STRANGE
    position = 0
    for _ in range(count):
        if receives[position, STATUS] == IN_PROGRESS:
            position += 1
        else:
            receive_again(api, worker, receives, count, position, capacity)
    return ADDED


@kernel
def march(
    api, worker, files, receives, count, capacity, woken, patience, score, first, lines, expected, frame, headers, x,
    rows, columns, sequence, homes, chosen, taken
):  # fmt: skip
    """Many layers one after the other: what is recorded of each, and its exchange; returns the entry where it stopped.

    Args:
        patience: nanoseconds of the longest sleep, and of the longest wait for replies.
        score: int64 [2 x layers, 4]: address and number of recorded calls, then what follows them, ASK, COLLECT or
            NEITHER, and the layer's number among those with experts.
        first: entry to begin with.
        headers: int64, addresses; of every layer with experts, as homes uint64 [layers, experts].
        x, rows: addresses of the residual stream and of what experts read, both fp32 [len(chosen[0]), columns].
        sequence: of the first exchange; chosen: uint32 [layers, T, k].
        taken: int64 [layers], gets the nanoseconds of each exchange.

    Returns:
        (the entry, what stopped it: ADDED after the last one, SENT_NOTHING where UCX was busy, REFUSED by a kernel,
        else what ``collect`` says, when the last exchange was begun in nanoseconds of the monotonic clock)
    """
    began = 0
    for entry in range(first, len(score)):
        address, calls, what, layer = score[entry, 0], score[entry, 1], score[entry, 2], score[entry, 3]
        if native.play(address, calls) >= 0:
            return entry, REFUSED, began
        if what == ASK:
            began = clock(api)
            if not ask(api, lines, frame, headers[layer], rows, chosen.shape[1], columns, sequence):
                return entry, SENT_NOTHING, began
            sequence += 1
        elif what == COLLECT:
            times = (began, patience[0], clock(api) + patience[1])
            result = collect(
                api, worker, files, receives, count, capacity, woken, times, frame, expected, homes[layer],
                chosen[layer], x,
            )  # fmt: skip
            if result != ADDED:
                return entry, result, began
            taken[layer] = clock(api) - began
    return len(score), ADDED, began


@helper
def _reply(api, asked, line, room, count, digest, most, us):
    """Send what lies at ``room`` to a peer whose endpoint and requests are in ``line``; returns bytes sent."""
    _copy_header(asked, room)
    reply, meta_bytes = _header(room), most * _PART
    reply.kind, reply.sender, reply.rows, reply.meta_bytes, reply.digest = _COMBINE, us, count, meta_bytes, digest
    reply.sent = 0
    nbytes = _body(meta_bytes) + 4 * count * np.int64(reply.columns)
    view1(line[2], 1, I64)[0] = send(api, line[1], room, nbytes, FRAME_TAG)
    return meta_bytes + 4 * count * np.int64(reply.columns)


@helper
def _serve(api, address, capacity, facts, senders, numbers, recorded, homes, counts, tally):
    """Answer a frame; False, having sent nothing, when it is none for us here."""
    asked = _header(address)
    if not _fits(asked, _DISPATCH, np.uint64(facts[MESH]), facts[COLUMNS], capacity) or asked.meta_bytes:
        return False
    traced = asked.trace[0] | asked.trace[1] | asked.trace[2]
    if traced or asked.placement != facts[PLACEMENT] or asked.layer >= len(numbers) or asked.rows > MOST_ROWS:
        return False
    layer, who, rows = numbers[asked.layer], _find(senders, asked.sender), np.int64(asked.rows)
    if layer < 0 or who < 0 or recorded[layer, rows, 0] == 0 or busy(api, senders[who, 2]):
        return False
    r, began, room, most = recorded[layer, rows], clock(api), senders[who, 3], rows * facts[TOP_K]
    meta = view1(room + HEADER_BYTES, most * _PART, _BYTES)
    code, parts, digest = answer(
        r[0], r[1], r[2], r[3], r[4], r[5], r[6], r[7], r[8], address + HEADER_BYTES, homes[layer],
        np.uint64(asked.live), facts[INSTANCE], facts[POLICY], meta, room + _body(most * _PART), counts[layer],
    )  # fmt: skip
    if code != DONE:
        return False
    tally[BUSY_NS] += clock(api) - began  # whom the reply wakes may have this core before the call that sends returns
    sent = _reply(api, address, senders[who], room, parts, digest, most, np.uint64(facts[SENDER]))
    tally[ANSWERS] += 1
    tally[PARTS_MADE] += parts
    tally[BYTES_IN] += 4 * rows * facts[COLUMNS]
    tally[BYTES_OUT] += sent
    return True


@kernel
def serve(
    api, worker, files, receives, count, capacity, woken, times, facts, senders, numbers, recorded, homes, counts, tally
):
    """Answer frames until the time is over or a wake; returns whether one is there that Python has to take.

    Args:
        receives, count, times: see ``ucp.wait``; capacity: bytes of each receive.
        senders: int64 [n, 4]: incarnation, endpoint, and the addresses of its requests and of room for a reply.
        numbers: int64, index of each layer, -1: it has no experts.
        recorded: int64 [layers, MOST_ROWS + 1, 9], how so many rows are answered (``Answer.recorded``); 0: unknown.
        homes: uint64 [layers, experts]; counts: int64 [layers, 2, experts].
    """
    while True:
        if wait(api, worker, files, receives, count, np.zeros(0, np.int64), woken, 1, times) <= 0:
            return False
        position = 0
        for _ in range(count):
            if receives[position, STATUS] == IN_PROGRESS:
                position += 1
                continue
            address = receives[position, ADDRESS]
            good = receives[position, STATUS] == 0
            if not good or not _serve(api, address, capacity, facts, senders, numbers, recorded, homes, counts, tally):
                return True
            receive_again(api, worker, receives, count, position, capacity)
        if woken[0] or clock(api) >= times[2]:
            return False


_NUMBER, _NUMBERS, _TABLE = types.int64, types.int64[::1], types.int64[:, ::1]
_WAITING = _NUMBERS, _NUMBER, _NUMBERS, _TABLE, _NUMBER, _NUMBER, _NUMBERS, types.UniTuple(_NUMBER, 3)


def compile_asking() -> None:
    """Compile what attention calls, or load it from the cache: the first exchange must not wait for it."""
    ask.compile((_NUMBERS, _TABLE, *[_NUMBER] * 6))
    collect.compile((*_WAITING, _NUMBER, _TABLE, types.uint64[::1], types.uint32[:, ::1], _NUMBER))
    score, table = (_TABLE, _NUMBER), types.uint64[:, ::1]
    told = _TABLE, _TABLE, _NUMBER, _NUMBERS, *[_NUMBER] * 4, table, types.uint32[:, :, ::1], _NUMBERS
    march.compile((*_WAITING[:-1], types.UniTuple(_NUMBER, 2), *score, *told))


def compile_serving() -> None:
    """The same for expert instances."""
    known = _NUMBERS, _TABLE, _NUMBERS, types.int64[:, :, ::1], types.uint64[:, ::1], types.int64[:, :, ::1], _NUMBERS
    serve.compile((*_WAITING, *known))
