"""UCX's C functions for messages, called without the interpreter: one by one, and in the loop that waits.

``ucxx`` owns the context, the worker and the endpoints; the handles that it gives out are used here. A request is a
number: 0 ended at once, below 0 failed at once, anything else has to be shown to ``ended`` until it has.
"""
# ruff: noqa: ANN001, ANN201, ANN202 - numba infers the types

import ctypes

import numpy as np
from numba import types
from numpy.typing import NDArray

from shared.kernels.jit import I64, call_native, helper, kernel, view1

FRAME_TAG = 1
"""Every frame travels under this tag; rows apart under one of their own, with the top bit set."""
IN_PROGRESS = 1
"""Status of a request; 0 is success, below 0 are errors."""
TRUNCATED = -9
"""Status of a receive whose message was longer than its memory."""
NOTHING, SENT = 0, -1
"""What ``wait`` returns besides how many receives have ended."""
_LAST_ERROR = -100
"""UCX returns pointers; seen as signed numbers, those from here to -1 are error codes."""
_PROGRESS, _SEND, _RECEIVE, _CHECK, _FREE, _CANCEL, _ARM, _YIELD, _CLOCK, _POLL, _PLAIN, _NOW = range(12)
REQUEST, STATUS, ADDRESS, SLOT = range(4)
"""Columns of a table of receives: int64 [most, 4], in the order in which their messages begin to arrive."""
_HEADER_WORDS = 16
_MONOTONIC = 1
_NS = 1_000_000_000
_READABLE = 1
_POLLED = np.dtype([("descriptor", "<i4"), ("wanted", "<i2"), ("found", "<i2")])
"""A struct pollfd."""


class Functions:
    """Addresses of the C functions, in the form that the compiled ones below take. Raises OSError without UCX."""

    def __init__(self) -> None:
        import libucx

        ucp, libc = libucx.load_library()[-1], ctypes.CDLL(None)
        names = ("worker_progress", "tag_send_nbx", "tag_recv_nbx", "request_check_status", "request_free")
        functions = [getattr(ucp, f"ucp_{name}") for name in (*names, "request_cancel", "worker_arm")]
        functions += [libc.sched_yield, libc.clock_gettime, libc.ppoll]
        addresses = [ctypes.cast(function, ctypes.c_void_p).value for function in functions]
        self._plain = np.zeros(16, np.int64)  # a ucp_request_param_t in which nothing is set: bytes, no callback
        self._now = np.zeros(2, np.int64)  # a timespec
        self.table: NDArray[np.int64] = np.array([*addresses, self._plain.ctypes.data, self._now.ctypes.data], np.int64)


def files(worker: int, wake: int) -> NDArray[np.int64]:
    """What ``wait`` sleeps on: the worker's descriptor, and one that is readable when it shall wake up."""
    return np.array([(worker, _READABLE, 0), (wake, _READABLE, 0)], _POLLED).view(np.int64)


@kernel
def send(api, endpoint, address, nbytes, tag):
    """Start sending; returns a request. The memory belongs to UCX until it has ended."""
    return call_native(api[_SEND], (endpoint, address, nbytes, tag, api[_PLAIN]))


@kernel
def receive(api, worker, address, nbytes, tag):
    """Start receiving the next message with exactly this tag; returns a request."""
    return call_native(api[_RECEIVE], (worker, address, nbytes, tag, -1, api[_PLAIN]))


@kernel
def ended(api, request):
    """IN_PROGRESS, or how the request ended; then it is freed and must not be shown again."""
    if _LAST_ERROR <= request <= 0:
        return request
    status = _status(api, request)
    if status != IN_PROGRESS:
        call_native(api[_FREE], (request,))
    return status


@kernel
def cancel(api, worker, request):
    """Ask UCX to end a request in progress."""
    call_native(api[_CANCEL], (worker, request))


@helper
def _status(api, request):
    if _LAST_ERROR <= request <= 0:
        return request
    return np.int64(np.int8(call_native(api[_CHECK], (request,))))  # ucs_status_t has one byte


@helper
def clock(api):
    """Nanoseconds of the monotonic clock."""
    call_native(api[_CLOCK], (_MONOTONIC, api[_NOW]))
    now = view1(api[_NOW], 2, I64)
    return now[0] * _NS + now[1]


@helper
def _sleep(api, worker, files, longest):
    """Until a file is readable, at most so many nanoseconds; not at all when there is work already."""
    if call_native(api[_ARM], (worker,)) & 255:
        return
    span = view1(api[_NOW], 2, I64)
    span[0], span[1] = longest // _NS, longest % _NS
    call_native(api[_POLL], (files.ctypes.data, len(files), api[_NOW], 0))


@kernel
def wait(api, worker, files, receives, count, sends, woken, together, times):
    """Drive UCX until something ends: polling for a while, then asleep in between.

    Args:
        files: see ``files``.
        receives: a table of receives; the STATUS of the first ``count`` becomes IN_PROGRESS, or how they ended: then
            their requests are freed.
        sends: int64, requests.
        woken: int64 [1]; another thread makes it 1 to end the wait.
        together: how many receives shall have ended.
        times: up to when the core is only yielded, how long a sleep may be, and when to end: nanoseconds, the first and
            the last of the monotonic clock.

    Returns:
        How many receives have ended, when as many as wanted have or the wait is over; SENT when a send has ended;
        NOTHING when woken or late.
    """
    polled, nap, until = times
    while True:
        call_native(api[_PROGRESS], (worker,))
        done, now = 0, clock(api)
        for i in range(count):
            done += _status(api, receives[i, REQUEST]) != IN_PROGRESS
        over = woken[0] != 0 or now >= until
        if done and (over or done >= together):
            for i in range(count):
                receives[i, STATUS] = ended(api, receives[i, REQUEST])
            return done
        for request in sends:
            if request and _status(api, request) != IN_PROGRESS:
                return SENT
        if over:
            return NOTHING
        if now < polled:
            call_native(api[_YIELD], (0,))
        else:
            _sleep(api, worker, files, min(nap, until - now))


@helper
def receive_again(api, worker, receives, count, position, nbytes):
    """The memory of a receive that has ended takes the next frame: it becomes the last one of the table."""
    address, slot = receives[position, ADDRESS], receives[position, SLOT]
    for i in range(position, count - 1):
        receives[i] = receives[i + 1]
    view1(address, _HEADER_WORDS, I64)[:] = 0  # a message shorter than one must not revive the one that was here before
    receives[count - 1, REQUEST] = receive(api, worker, address, nbytes, FRAME_TAG)
    receives[count - 1, STATUS], receives[count - 1, ADDRESS], receives[count - 1, SLOT] = IN_PROGRESS, address, slot


@helper
def busy(api, requests):
    """Whether UCX holds a frame to a peer, or has failed to send it; its requests int64 [2] are at an address."""
    flying = view1(requests, 2, I64)
    if flying[0] > 0 and _status(api, flying[0]) == 0:
        call_native(api[_FREE], (flying[0],))
        flying[0] = 0
    return flying[0] != 0 or flying[1] != 0


def compile_functions() -> None:
    """Compile all of these, or load them from the cache: the first frame must not wait for it."""
    table, number = types.int64[::1], types.int64
    send.compile((table, number, number, number, number))
    receive.compile((table, number, number, number, number))
    ended.compile((table, number))
    cancel.compile((table, number, number))
    times = types.UniTuple(number, 3)
    wait.compile((table, number, table, types.int64[:, ::1], number, table, table, number, times))
