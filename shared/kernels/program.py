"""Kernel calls written down once and carried out again without the interpreter: what CUDA graphs are on a GPU.

Most of a decode step's work reads weights and wipes the caches; the interpreter would then have to come back from
memory before every kernel.
"""
# ruff: noqa: ANN001, ANN201 - numba infers the types

import struct
from collections.abc import Callable
from typing import Any, TypeVar

import numpy as np

from shared.kernels.jit import call_native, kernel, routine, view2

T = TypeVar("T")
ARGUMENTS = 23
"""Most arguments of an operation."""
OPERATION = "int64(int64)"
"""Signature of operations: they read their arguments at an address and return 1, or 0 when they refuse them."""


@kernel
def replay(address, count):
    """Carry out ``count`` operations, int64 [count, 1 + ARGUMENTS] at an address; returns how many went well."""
    operations = view2(address, count, 1 + ARGUMENTS, np.int64)
    for i in range(count):
        if not call_native(operations[i, 0], (address + (i * (1 + ARGUMENTS) + 1) * 8,)):
            return i
    return count


class Tape:
    """Operations being written down, with everything that their addresses point to."""

    def __init__(self) -> None:
        self._rows: list[list[int]] = []
        self._names: list[str] = []
        self._kept: list[object] = []

    def add(self, name: str, address: int, arguments: tuple[int | float, ...], kept: tuple[object, ...]) -> None:
        """Write down one call; floats travel as their bits."""
        assert len(arguments) <= ARGUMENTS
        numbers = [_bits(value) if isinstance(value, float) else int(value) for value in arguments]
        self._rows.append([address, *numbers, *[0] * (ARGUMENTS - len(numbers))])
        self._names.append(name)
        self._kept += kept

    def finish(self, result: T) -> Callable[[], T]:
        """What carries the tape out again and returns ``result``; raises ValueError when a kernel refuses its input."""
        operations = np.array(self._rows, np.int64).reshape(len(self._rows), 1 + ARGUMENTS)
        address, count, names, kept = operations.ctypes.data, len(operations), self._names, (operations, self._kept)

        def run() -> T:
            done = replay(address, count)
            if done != count:
                raise ValueError(f"{names[done]} refused its input, in a tape of {len(kept[0])} operations")
            return result

        return run


def _bits(value: float) -> int:
    """The bits of an fp64 as int64."""
    return struct.unpack("<q", struct.pack("<d", value))[0]


def compile_operation(function: Callable[[Any], Any]) -> Any:
    """An operation as a C function; lives as long as the result."""
    return routine(OPERATION, function)
