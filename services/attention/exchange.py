"""The attention side of an exchange: rows go out to the experts, their parts come back and are summed exactly.

Waiting, repeating and deadlines are here; who is asked is in targets.py, what a reply must look like in replies.py.
Nothing here gates, chooses replicas or computes experts: that is the experts' side.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Protocol

from torch import Tensor

from shared.messages import Placement
from shared.telemetry import NO_TRACE
from shared.transport.base import Outgoing


@dataclass(frozen=True, slots=True)
class ExpertInstance:
    """One expert instance that may be asked."""

    id: str
    incarnation: int
    address: bytes
    """Worker address on the data plane."""
    last_seen: float
    """``time.monotonic()`` of its newest heartbeat: ends a suspicion that is older."""


@dataclass(frozen=True, slots=True)
class View:
    """What the control plane knows, as one immutable snapshot for the compute thread."""

    placement: Placement | None = None
    instances: Mapping[str, ExpertInstance] = field(default_factory=dict)
    """By instance id; those that may be asked, suspects of the control plane included."""


class Staged(Outgoing, Protocol):
    """Rows on their way: fill ``rows`` [rows, hidden] with normed hidden states, then dispatch once.

    They may be read until the exchange is combined, or another is staged.
    """


class Handle(Protocol):
    """One open exchange, made by ``dispatch`` and consumed by ``combine``."""

    layer: int


class Exchange(Protocol):
    """What the engine calls, always from its compute thread (``wake`` from any)."""

    def update(self, view: View) -> None:
        """Take a new view. Only between steps: exchanges that are still open are given up."""
        ...

    def ready(self) -> bool:
        """True when every expert of every layer has a home that may be asked and is not suspected."""
        ...

    def stage(self, rows: int) -> Staged:
        """A send buffer for ``rows`` rows; valid until it is dispatched."""
        ...

    def dispatch(self, layer: int, staged: Staged, trace: tuple[bytes, bytes] = NO_TRACE) -> Handle:
        """Send the rows to the experts of ``layer`` (checkpoint index). Raises ExchangeUnavailable.

        ``trace``: see ``Telemetry.frame``; experts record a span for a frame that carries one.
        """
        ...

    def combine(self, handle: Handle, x: Tensor) -> None:
        """Wait for all parts, then x [rows, hidden] += weighted experts, in ascending expert order.

        Raises ExchangeUnavailable within a bounded time; ``x`` is unchanged then.
        """
        ...

    def idle_wait(self, timeout: float) -> None:
        """Nothing to do, or not ready: drop stale frames and probe suspects, until ``timeout`` (s) or ``wake``."""
        ...

    def wake(self) -> None:
        """End an ``idle_wait`` early. Thread-safe."""
        ...
