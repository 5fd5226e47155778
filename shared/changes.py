"""Messages about changes of the placement: what is stored, and what a person asks the scheduler for.

Like those of shared/messages.py, of which Placement itself is one.
"""

from enum import StrEnum
from typing import Literal

from pydantic import Field

from shared.messages import U64, Count, Message, Placement


class Phase(StrEnum):
    """What is under way with the placement."""

    SETTLED = "settled"
    """Nothing."""
    PREPARE = "prepare"
    """Expert instances load the homes of a new version; everybody uses the old one."""
    COMMIT = "commit"
    """Attention instances switch to the new version between two steps; expert instances answer both."""


class PlacementRecord(Message):
    """All that is stored about the placement, under one key, by compare-and-set: at most two versions."""

    epoch: U64
    """Epoch of the leader that wrote it last."""
    serial: Count
    """Counts its writes."""
    newest: Count
    """Highest version that was ever begun, aborted ones included: none is used twice."""
    phase: Phase = Phase.SETTLED
    committed: Placement | None = None
    """What attention uses, or switches to."""
    other: Placement | None = None
    """PREPARE: the one that may follow. COMMIT: the one before. SETTLED: None."""
    verdict: str = ""
    """How the last change ended, in one line."""

    @property
    def versions(self) -> tuple[Placement, ...]:
        """The placements that expert instances answer, or load to answer, oldest first."""
        return tuple(sorted((p for p in (self.committed, self.other) if p), key=lambda p: p.version))


class Rebalance(Message):
    """Person -> leading scheduler, request/reply with RebalancePlan: move replicas, where that helps or as given."""

    dry_run: bool = False
    given: dict[int, dict[str, tuple[Count, ...]]] = Field(default_factory=dict)
    """Layer -> instance -> experts with a home there; other layers stay. Empty: by what exchanges have activated."""


class LayerPlan(Message):
    """What a rebalance changes in one layer."""

    layer: Count
    moved: Count
    """Replicas to be loaded."""
    bytes: Count
    """Of their weights."""
    before: float | None
    """Activated experts on the busiest instance, mean over the latest exchanges; None: there were none."""
    after: float | None


class RebalancePlan(Message):
    """Reply to Rebalance."""

    layers: tuple[LayerPlan, ...]
    ticket: str = ""
    """To ask for the outcome with; empty for a dry run."""


class Ticket(Message):
    """Person -> leading scheduler, request/reply with Outcome."""

    ticket: str


class Outcome(Message):
    """How a rebalance by hand has ended, if it has."""

    state: Literal["open", "committed", "aborted", "unknown"]
    text: str = ""
