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

IN_PROGRESS = 1
"""Status of a request; 0 is success, below 0 are errors."""
TRUNCATED = -9
"""Status of a receive whose message was longer than its memory."""
NOTHING, SENT = -1, -2
"""What ``wait`` returns besides the number of a receive."""
_LAST_ERROR = -100
"""UCX returns pointers; seen as signed numbers, those from here to -1 are error codes."""
_PROGRESS, _SEND, _RECEIVE, _CHECK, _FREE, _CANCEL, _YIELD, _CLOCK, _PLAIN, _NOW = range(10)
_MONOTONIC = 1


class Functions:
    """Addresses of the C functions, in the form that the compiled ones below take. Raises OSError without UCX."""

    def __init__(self) -> None:
        import libucx

        ucp, libc = libucx.load_library()[-1], ctypes.CDLL(None)
        names = ("worker_progress", "tag_send_nbx", "tag_recv_nbx", "request_check_status", "request_free")
        functions = [getattr(ucp, f"ucp_{name}") for name in (*names, "request_cancel")]
        addresses = [ctypes.cast(f, ctypes.c_void_p).value for f in (*functions, libc.sched_yield, libc.clock_gettime)]
        self._plain = np.zeros(16, np.int64)  # a ucp_request_param_t in which nothing is set: bytes, no callback
        self._now = np.zeros(2, np.int64)  # a timespec
        self.table: NDArray[np.int64] = np.array([*addresses, self._plain.ctypes.data, self._now.ctypes.data], np.int64)


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
def _time(api):
    """Nanoseconds of the monotonic clock."""
    call_native(api[_CLOCK], (_MONOTONIC, api[_NOW]))
    now = view1(api[_NOW], 2, I64)
    return now[0] * 1_000_000_000 + now[1]


@kernel
def wait(api, worker, receives, sends, woken, until):
    """Drive UCX until something ends, yielding the core in between.

    Args:
        receives, sends: int64, requests.
        woken: int64 [1]; another thread makes it 1 to end the wait.
        until: nanoseconds of the monotonic clock.

    Returns:
        The number of the first receive that has ended; SENT when a send has; NOTHING when woken or late.
    """
    while True:
        call_native(api[_PROGRESS], (worker,))
        for i in range(len(receives)):
            if _status(api, receives[i]) != IN_PROGRESS:
                return i
        for request in sends:
            if _status(api, request) != IN_PROGRESS:
                return SENT
        if woken[0] or _time(api) >= until:
            return NOTHING
        call_native(api[_YIELD], (0,))


def compile_functions() -> None:
    """Compile all of these, or load them from the cache: the first frame must not wait for it."""
    table, number = types.int64[::1], types.int64
    send.compile((table, number, number, number, number))
    receive.compile((table, number, number, number, number))
    ended.compile((table, number))
    cancel.compile((table, number, number))
    wait.compile((table, number, table, table, table, number))
