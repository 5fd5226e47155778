"""Keeps cores from halting while a step is under way, so that a thread that is woken there runs at once.

A core with nothing to run halts. In a virtual machine the host then gives it to somebody else, and takes its time to
give it back: tens of microseconds where nothing else runs, milliseconds on a busy host, several times per layer.
"""
# ruff: noqa: ANN001, ANN202 - numba infers the types

import ctypes
import os
import threading
from collections.abc import Iterable
from contextlib import suppress
from typing import Protocol

import numpy as np

from shared.kernels.jit import call_native, kernel

_CLOSED, _RELEASED, _HELD = -1, 0, 1


class KeepAwake(Protocol):
    """Told when cores will be needed; from one thread."""

    def hold(self) -> None:
        """From now on no core halts. Cheap when it is so already."""
        ...

    def release(self) -> None:
        """Cores may halt again: nothing is under way."""
        ...

    def close(self) -> None:
        """End what keeps them busy."""
        ...


class LetHalt:
    """Does nothing: for devices that do the waiting themselves."""

    def hold(self) -> None: ...

    def release(self) -> None: ...

    def close(self) -> None: ...


class BusyCores:
    """A thread on each core that offers it to everybody else and runs only when nobody wants it (SCHED_IDLE).

    It never needs the interpreter, for the interpreter's lock must not wait for a thread of the lowest priority. Linux
    gives each session and each container its own share of a core, whatever the priorities inside: pools that share
    cores must be in the same one, or this takes time from the others.
    """

    def __init__(self, cores: Iterable[int]) -> None:
        libc = ctypes.CDLL(None)
        self._functions = np.array([_address(libc.read), _address(libc.sched_yield)], np.int64)
        self._state = np.zeros(1, np.int64)
        self._threads = [_Keeper(core, self._state, self._functions) for core in cores]
        for thread in self._threads:
            thread.start()

    def hold(self) -> None:
        if self._state[0] != _HELD:
            self._tell(_HELD)

    def release(self) -> None:
        self._state[0] = _RELEASED

    def close(self) -> None:
        self._tell(_CLOSED)
        for thread in self._threads:
            thread.join()
            os.close(thread.bell)

    def _tell(self, state: int) -> None:
        self._state[0] = state
        for thread in self._threads:
            os.eventfd_write(thread.bell, 1)


class _Keeper(threading.Thread):
    def __init__(self, core: int, state: np.ndarray, functions: np.ndarray) -> None:
        super().__init__(name=f"keep-awake-{core}", daemon=True)
        self.bell = os.eventfd(0, os.EFD_CLOEXEC)
        self._core, self._state, self._functions = core, state, functions
        self._count = np.zeros(1, np.int64)

    def run(self) -> None:
        with suppress(OSError):  # a core that we may not use: it stays where it is
            os.sched_setaffinity(0, {self._core})
        try:
            os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))
        except (AttributeError, OSError):  # at any other priority it would be in the way
            return
        _keep(self._functions, self._state, self.bell, self._count, self._count.ctypes.data)


@kernel
def _keep(functions, state, bell, count, count_address):
    """Until closed: sleep until the bell rings, then offer the core around until released."""
    while state[0] != _CLOSED:
        if state[0] == _RELEASED:
            call_native(functions[0], (bell, count_address, 8))
        call_native(functions[1], (0,))
    return count[0]


def _address(function: object) -> int:
    address = ctypes.cast(function, ctypes.c_void_p).value  # type: ignore[arg-type]
    assert address is not None  # libc has it
    return address
