"""Kernel calls written down once and carried out again: what CUDA graphs are on a GPU.

A decode step is hundreds of short calls. Checking shapes and turning tensors into addresses takes longer than some of
the kernels, all the more as their weights have wiped the interpreter out of the caches.
"""

from collections.abc import Callable
from typing import Any, TypeVar

from torch import Tensor

from shared.kernels.cpu_checks import output, plain

T = TypeVar("T")


class Tape:
    """Numba kernels and their arguments, and the tensors that were made on the way."""

    def __init__(self) -> None:
        self.calls: list[tuple[Any, tuple[Any, ...]]] = []
        self.kept: list[Tensor] = []

    def play(self) -> None:
        """Carry the calls out. Raises ValueError when a kernel refuses its input."""
        for function, arguments in self.calls:
            if function(*arguments) is False:
                raise ValueError(f"{function.__name__} refused its input: an index is out of range")


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

        def again() -> T:
            tape.play()
            return result

        return again

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
