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

CLOSE_LIMIT_S = 2.0
_CLOSED, _RELEASED, _HELD = -1, 0, 1
_SCHED_IDLE = 5


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
        functions = (libc.read, libc.sched_yield, libc.sched_setscheduler)
        self._functions = np.array([_address(function) for function in functions], np.int64)
        self._state = np.full(1, _CLOSED)
        self._scratch = np.zeros(2, np.int64)
        self._keep(0)  # compiled here: a thread of the lowest priority would hold the interpreter's lock for it
        self._state[0] = _RELEASED
        self._bells: list[int] = []
        self._threads: list[threading.Thread] = []
        for core in cores:
            self._start(core)

    def hold(self) -> None:
        if self._state[0] != _HELD:
            self._tell(_HELD)

    def release(self) -> None:
        self._state[0] = _RELEASED

    def close(self) -> None:
        self._tell(_CLOSED)
        for thread, bell in zip(self._threads, self._bells, strict=True):
            thread.join(CLOSE_LIMIT_S)
            if not thread.is_alive():
                os.close(bell)

    def _tell(self, state: int) -> None:
        self._state[0] = state
        for bell in self._bells:
            os.eventfd_write(bell, 1)

    def _start(self, core: int) -> None:
        bell = os.eventfd(0, os.EFD_CLOEXEC)
        thread = threading.Thread(target=self._run, args=(core, bell), name=f"keep-awake-{core}", daemon=True)
        self._bells.append(bell)
        self._threads.append(thread)
        thread.start()

    def _run(self, core: int, bell: int) -> None:
        with suppress(OSError):  # a core that we may not use: it stays where it is
            os.sched_setaffinity(0, {core})
        self._keep(bell)

    def _keep(self, bell: int) -> None:
        _keep(self._functions, self._state, bell, self._scratch, self._scratch.ctypes.data)


@kernel
def _keep(functions, state, bell, scratch, address):
    """Until closed: sleep until the bell rings, then offer the core around until released.

    ``scratch`` at ``address``: the priority 0 that SCHED_IDLE wants, then what is read from the bell.
    """
    if state[0] == _CLOSED or call_native(functions[2], (0, _SCHED_IDLE, address)) & 0xFFFFFFFF:
        return  # at any other priority it would be in the way
    while state[0] != _CLOSED:
        if state[0] == _RELEASED:
            call_native(functions[0], (bell, address + 8, 8))
        call_native(functions[1], (0,))
    scratch[1] = 0  # keeps it alive


def _address(function: object) -> int:
    address = ctypes.cast(function, ctypes.c_void_p).value  # type: ignore[arg-type]
    assert address is not None  # libc has it
    return address
