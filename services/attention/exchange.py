"""The attention side of an exchange: rows go out to the experts, their parts come back and are summed exactly.

The seam only: mesh_exchange.py asks expert instances, local_exchange.py computes the experts of a monolith itself.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

from torch import Tensor

from services.attention.ways import Row
from shared.messages import Placement
from shared.metrics import Sample
from shared.telemetry import NO_TRACE


@dataclass(frozen=True, slots=True)
class ExpertInstance:
    """One expert instance that may be asked."""

    id: str
    incarnation: int
    address: bytes
    """Worker address on the data plane."""
    last_seen: float
    """``time.monotonic()`` of its newest heartbeat: ends a suspicion that is older."""
    cores: frozenset[int] = frozenset()
    """Cores of this node on which it computes."""
    node: str = ""


class Neighbour(NamedTuple):
    """An attention instance of this node, this one included."""

    incarnation: int
    address: bytes
    """Worker address on the data plane."""


@dataclass(frozen=True, slots=True)
class View:
    """What the control plane knows, as one immutable snapshot for the compute thread."""

    placement: Placement | None = None
    instances: Mapping[str, ExpertInstance] = field(default_factory=dict)
    """By instance id; those that may be asked, suspects of the control plane included."""
    neighbours: Mapping[str, Neighbour] = field(default_factory=dict)
    """By instance id: who may run steps together with this instance."""
    node: str = ""
    """Of this instance."""


class Handle(Protocol):
    """One open exchange, made by ``dispatch`` and consumed by ``combine``."""

    layer: int


class Exchange(Protocol):
    """What an instance asks of its experts, from its compute thread; ``foresee``, ``wake`` and ``samples`` from any."""

    @property
    def address(self) -> bytes:
        """Of this instance on the data plane; empty: it has none."""
        ...

    def warm_up(self, layer: int, x: Tensor) -> None:
        """Compile what an exchange of ``layer`` runs, on x [1, hidden], which it changes."""
        ...

    def foresee(self, view: View) -> None:
        """Who is not in it any more need not be waited for. An ``update`` with it follows."""
        ...

    def update(self, view: View) -> None:
        """Take a new view. Only between steps: exchanges that are still open are given up."""
        ...

    def ready(self) -> bool:
        """True when every expert of every layer has a home that may be asked and is not suspected."""
        ...

    def begin(self, rows: int, prefill: bool = False) -> bool:
        """A step of so many rows begins. True: instances share its exchanges, and it must be one micro-batch.

        ``prefill``: it computes prompts; changes no result.
        """
        ...

    def end(self) -> None:
        """The step is over, whether it succeeded or not."""
        ...

    def dispatch(self, layer: int, rows: Tensor, trace: tuple[bytes, bytes] = NO_TRACE) -> Handle:
        """Send rows [T, hidden], normed hidden states, to the experts of ``layer`` (checkpoint index).

        ``rows`` must not change before ``combine``: a repeat reads them again. ``trace``: see ``Telemetry.frame``;
        experts record a span for a frame that carries one. Raises ExchangeUnavailable.
        """
        ...

    def combine(self, handle: Handle, x: Tensor) -> None:
        """Wait for all parts, then x [rows, hidden] += weighted experts, in ascending expert order.

        Raises ExchangeUnavailable within a bounded time; ``x`` is unchanged then.
        """
        ...

    def abandon(self) -> None:
        """Give up all exchanges that are open: their step has failed."""
        ...

    def idle_wait(self, timeout: float) -> None:
        """Nothing to do, or not ready: drop stale frames and probe suspects, until ``timeout`` (s) or ``wake``."""
        ...

    def wake(self) -> None:
        """End an ``idle_wait`` early."""
        ...

    def ways(self) -> Sequence[Row]:
        """The cost table; empty where there is nothing to choose. Any thread."""
        ...

    def samples(self) -> Iterable[Sample]:
        """For /metrics."""
        ...

    def close(self) -> None:
        """Let go of the data plane; nothing is called after it."""
        ...
