"""The attention side of an exchange: rows go out to the experts, their parts come back and are summed exactly.

The seam only: mesh_exchange.py asks expert instances, local_exchange.py computes the experts of a monolith itself.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from services.attention.ways import Row
from shared.express import ASK, COLLECT
from shared.messages import Placement
from shared.metrics import Sample
from shared.models.spec import LayerSpec
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


class Score(NamedTuple):
    """All layers of a step as recorded calls, two entries for each: attention, and what the layer does beside it."""

    entries: NDArray[np.int64]
    """See ``shared.express.march``."""
    layers: tuple[int, ...]
    """Those with experts, checkpoint indices."""

    @classmethod
    def of(cls, calls: Sequence[tuple[int, int]], layers: Sequence[LayerSpec]) -> "Score":
        """``calls``: address and number of each entry."""
        table, moe = np.zeros((len(calls), 4), np.int64), [layer.index for layer in layers if layer.moe]
        table[:, :2] = calls
        for i, layer in enumerate(layers):
            if layer.moe:
                table[2 * i : 2 * i + 2, 2] = ASK, COLLECT
                table[2 * i : 2 * i + 2, 3] = moe.index(layer.index)
        return cls(table, tuple(moe))


class Halt(NamedTuple):
    """Where ``march`` stopped."""

    calls: int
    """So many entries of the score have been carried out, but for what follows the last of them, unless all have."""
    handle: Handle | None
    """The exchange that is open."""


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

    def march(self, score: Score, first: int, rows: Tensor, x: Tensor) -> Halt | None:
        """Carry out entries from ``first`` on with their exchanges, of ``rows`` and into ``x`` [T, hidden].

        As far as that goes without anything unusual; None: not at all. Raises ValueError when a kernel refuses.
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
