"""One core for each thread of a team, so that a thread that wakes up never queues behind its own team."""
# ruff: noqa: ANN001, ANN202 - numba infers the types

import ctypes
from collections.abc import Sequence

import numba
import numpy as np

from shared.kernels.jit import call_native, parallel_kernel

_MASK_WORDS = 16
"""A kernel's cpu_set_t: 1,024 cores."""


def pin_team(cores: Sequence[int]) -> None:
    """Keep each thread of the calling thread's team, which has as many as there are ``cores``, on one of them.

    Linux only; a core that this process may not use leaves the thread where it was. Nothing is done when the
    environment allows fewer threads.
    """
    if len(cores) > numba.config.NUMBA_NUM_THREADS:  # type: ignore[attr-defined]
        return
    masks = np.zeros((len(cores), _MASK_WORDS), np.uint64)
    for mask, core in zip(masks, cores, strict=True):
        mask[core // 64] = 1 << core % 64
    function = ctypes.cast(ctypes.CDLL(None).sched_setaffinity, ctypes.c_void_p).value
    assert function is not None  # libc has it
    numba.set_num_threads(len(cores))
    _pin(np.int64(function), masks, masks.ctypes.data)


@parallel_kernel
def _pin(function, masks, address):
    for thread in numba.prange(len(masks)):
        call_native(function, (0, masks.shape[1] * 8, address + thread * masks.shape[1] * 8))
