"""Kernel calls written down once and carried out again: what CUDA graphs are on a GPU.

A decode step is hundreds of short calls. Checking shapes and turning tensors into addresses takes longer than some of
the kernels, all the more as their weights have wiped the interpreter out of the caches.
"""

from collections.abc import Callable
from typing import Any, Generic, TypeVar

import numpy as np
from torch import Tensor

from shared.kernels import native
from shared.kernels.cpu_checks import output, plain

T = TypeVar("T")


class Tape:
    """Numba kernels and their arguments, and the tensors that were made on the way."""

    def __init__(self) -> None:
        self.calls: list[tuple[Any, tuple[Any, ...]]] = []
        self.kept: list[Tensor] = []


class Recording(Generic[T]):
    """A tape that can be played, and what the recorded call returned."""

    def __init__(self, tape: Tape, result: T) -> None:
        self._result = result
        self._kept = tape.kept
        self._names = [function.__name__ for function, _ in tape.calls]
        self._calls = np.array([native.encode(*call) for call in tape.calls], native.CALL)
        self._address = self._calls.ctypes.data

    @property
    def where(self) -> tuple[int, int]:
        """Address and number of the calls, for ``native.play``."""
        return self._address, len(self._names)

    def __call__(self) -> T:
        """Carry the calls out. Raises ValueError when a kernel refuses its input."""
        refused = native.play(self._address, len(self._names))
        if refused >= 0:
            raise ValueError(f"{self._names[refused]} refused its input (an index is out of range) or had no memory")
        return self._result


class Recorder:
    """Base of kernels that can be recorded. Arguments stay as they were: the tensors behind addresses must live on."""

    _tape: Tape | None = None

    def record(self, call: Callable[[], T]) -> Callable[[], T]:
        """See ``Kernels.record``. ``call`` runs now, but none of its kernels does."""
        self._tape = tape = Tape()
        try:
            result = call()
        finally:
            self._tape = None
        return Recording(tape, result)

    def _do(self, function: Any, *arguments: Any) -> bool:
        """Run a numba kernel now, or write it down."""
        if self._tape is None:
            return function(*arguments)
        self._tape.calls.append((function, arguments))
        return True

    def _plain(self, x: Tensor) -> Tensor:
        """``x`` as contiguous fp32. A copy that is made while recording stays as it is then: good for weights only."""
        return self._keep(plain(x))

    def _output(self, out: Tensor | None, shape: tuple[int, ...]) -> Tensor:
        """``out`` checked, or a new fp32 tensor."""
        return self._keep(output(out, shape))

    def _keep(self, tensor: Tensor) -> Tensor:
        if self._tape is not None:
            self._tape.kept.append(tensor)
        return tensor
