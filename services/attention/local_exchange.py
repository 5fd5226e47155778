"""The exchange of a monolith: every expert is in this process, so nothing is sent and nothing can be late.

The same gate, kernels and order of sums as in a mesh (shared/models/local.py), hence the same bits. As in a mesh, only
the gate's kernels are recorded; and no spans of exchanges, for there are none.
"""

import threading
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from torch import Tensor

from services.attention.exchange import Halt, Handle, Score, View
from services.attention.ways import Row
from shared.metrics import Sample
from shared.models.local import LocalExperts
from shared.telemetry import NO_TRACE


@dataclass(slots=True)
class LocalHandle:
    """What ``combine`` will compute."""

    layer: int
    rows: Tensor
    """[T, hidden]; the caller's."""


class LocalExchange:
    """See ``Exchange``."""

    def __init__(self, experts: LocalExperts) -> None:
        self._experts = experts
        self._woken = threading.Event()

    @property
    def address(self) -> bytes:
        return b""

    def warm_up(self, layer: int, x: Tensor) -> None:
        self._experts.add(layer, x.clone(), x)

    def foresee(self, view: View) -> None:
        """Nobody is waited for."""

    def update(self, view: View) -> None:
        """Nobody is asked."""

    def ready(self) -> bool:
        return True

    def begin(self, rows: int, prefill: bool = False) -> bool:
        return False

    def end(self) -> None:
        """Nobody takes part."""

    def dispatch(self, layer: int, rows: Tensor, trace: tuple[bytes, bytes] = NO_TRACE) -> LocalHandle:
        return LocalHandle(layer, rows)

    def combine(self, handle: Handle, x: Tensor) -> None:
        assert isinstance(handle, LocalHandle)  # ours: dispatch made it
        self._experts.add(handle.layer, handle.rows, x)

    def march(self, score: Score, first: int, rows: Tensor, x: Tensor) -> Halt | None:
        return None

    def abandon(self) -> None:
        """Nothing is open that anybody else knows of."""

    def idle_wait(self, timeout: float) -> None:
        self._woken.wait(timeout)
        self._woken.clear()

    def wake(self) -> None:
        self._woken.set()

    def ways(self) -> Sequence[Row]:
        return ()

    def samples(self) -> Iterable[Sample]:
        return ()

    def close(self) -> None:
        """There is no data plane."""
