"""What either side of an exchange does with the other's frames, each in a single native call.

An expert instance gates, chooses replicas, computes and writes its reply; attention checks, arranges and adds what came
back. The interpreter would take as long for it as the experts of a small batch. Kernels are called as they were
recorded; the rules are those of shared/activation.py.
"""
# ruff: noqa: ANN001, ANN201, ANN202 - numba infers the types

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from shared.activation import INCOMPLETE, Choice, place_parts, plan, refuse
from shared.kernels import native
from shared.kernels.base import ExpertTable
from shared.kernels.cpu_elementwise import add_parts
from shared.kernels.jit import FP32, I32, I64, U32, helper, kernel, view1, view2
from shared.kernels.recorder import Tape

_GATE_REFUSED, _EXPERTS_REFUSED = -3, -4
"""Instead of what ``plan`` says."""
_TOKENS, _IDS, _OUT, _COUNT = 1, 2, 4, 8
"""Where the experts' kernel finds them among its numbers, counted from the address of its rows."""


class Answer:
    """A layer's gate and resident experts, recorded for a number of rows.

    Args:
        tape: the gate's calls and then one of experts that reads ``room`` and computes every choice.
        room: fp32 [T, H], what the recorded calls read.
        routed: weights fp32 [T, k] and ids int32 [T, k], what the gate writes.
        table: the experts'.
        out: where the recorded experts would write.
    """

    def __init__(
        self, tape: Tape, room: Tensor, routed: tuple[Tensor, Tensor], table: ExpertTable, out: Tensor
    ) -> None:
        self._kept = tape, room, routed, table  # the calls know their addresses, and another thread may swap tables
        self._calls = np.array([native.encode(*call) for call in tape.calls], native.CALL)
        first = self._calls[-1]["numbers"].tolist().index(out.data_ptr()) - _OUT
        weights, ids = routed
        places = room.data_ptr(), room.numel(), weights.data_ptr(), ids.data_ptr()
        self.recorded: tuple[int, ...] = self._calls.ctypes.data, len(self._calls) - 1, first, *places, *ids.shape

    def __call__(
        self,
        rows: Tensor,
        choice: Choice,
        meta: NDArray[np.uint8],
        out: Tensor,
        counts: NDArray[np.int64],
    ) -> tuple[int, int]:
        """See ``services.experts.compute.answer``. rows: contiguous fp32 [T, H]."""
        homes, live, instance, policy = choice
        rules = homes, np.uint64(live), instance, policy.code
        code, count, digest = answer(*self.recorded, rows.data_ptr(), *rules, meta, out.data_ptr(), counts)
        if code in (_GATE_REFUSED, _EXPERTS_REFUSED):
            part = "gate" if code == _GATE_REFUSED else "experts"
            raise ValueError(f"kernels of the {part} refused their input (an expert is not resident) or had no memory")
        refuse(code, len(homes))
        return count, digest


@helper
def _write(numbers, fractions, tokens, experts, weights):
    """PARTS of a reply."""
    for p in range(len(tokens)):
        numbers[3 * p], numbers[3 * p + 1], fractions[3 * p + 2] = tokens[p], experts[p], weights[p]
    numbers[3 * len(tokens) :] = 0


@helper
def _run_experts(at, first, tokens, experts, out):
    """The recorded call at an address, for these parts; False when it refuses them."""
    numbers = view1(at + native.NUMBERS_AT, native.NUMBERS, I64)
    numbers[first + _TOKENS], numbers[first + _IDS] = tokens.ctypes.data, experts.ctypes.data
    numbers[first + _OUT], numbers[first + _COUNT] = out, len(tokens)
    return native.play(at, 1) < 0


@kernel
def answer(calls, gates, first, room, size, weights, ids, rows, k, x, homes, live, instance, policy, meta, out, counts):
    """(what ``plan`` says or one of the above, number of parts, digest)"""
    target, source = view1(room, size, FP32), view1(x, size, FP32)
    for i in range(size):
        target[i] = source[i]
    if native.play(calls, gates) >= 0:
        return _GATE_REFUSED, 0, np.uint64(0)
    chosen, factors = view2(ids, rows, k, I32), view2(weights, rows, k, FP32)
    code, digest, tokens, experts, own = plan(chosen, factors, homes, live, instance, policy)
    count = len(tokens)
    _write(meta.view(np.uint32), meta.view(np.float32), tokens, experts, own)
    if code == -1 and count and not _run_experts(calls + gates * native.CALL_BYTES, first, tokens, experts, out):
        return _EXPERTS_REFUSED, 0, digest
    for p in range(count):
        counts[0, experts[p]] += 1
        counts[1, experts[p]] += p == 0 or experts[p] != experts[p - 1]
    return code, count, digest


@kernel
def gather(out, rows, depth, replies, homes, experts):
    """See ``Kernels.gather``; returns a number of shared.activation.PROBLEMS."""
    k = experts.shape[1]
    counts = np.zeros(rows, np.int32)
    source, index = np.empty((rows, k), np.int32), np.empty((rows, k), np.int32)
    weights, parts = np.empty((rows, k), np.float32), 0
    for i in range(len(replies)):
        instance, meta, count = replies[i, 0], replies[i, 1], replies[i, 3]
        numbers, fractions = view2(meta, count, 3, U32), view2(meta, count, 3, FP32)
        code = place_parts(numbers, fractions, i, instance, homes, counts, experts, source, index, weights)
        if code:
            return code
        parts += count
    if parts != rows * k:
        return INCOMPLETE
    add_parts(view2(out, rows, depth, FP32), replies[:, 2:], source, index, weights)
    return 0
