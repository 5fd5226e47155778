"""Which frames a faulty network delays, duplicates, reorders or drops: a deterministic policy without I/O."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from random import Random

from shared.transport.base import FrameKind


class Fault(StrEnum):
    DROP = "drop"
    DUPLICATE = "duplicate"
    """Arrives twice, the second time later."""
    DELAY = "delay"
    """Arrives later, and so do the frames behind it."""
    REORDER = "reorder"
    """Arrives later than frames that were sent after it."""


@dataclass(frozen=True)
class Rates:
    """Probability of each fault for one kind of frame; several faults can strike one frame."""

    drop: float = 0.0
    duplicate: float = 0.0
    delay: float = 0.0
    reorder: float = 0.0


@dataclass(frozen=True)
class Delivery:
    """One arrival of a frame."""

    delay: float
    """Seconds."""
    ordered: bool
    """False: frames that were sent later may overtake it."""


class Faults:
    """Decides the fate of every frame, from the seed, the link, the kind and the count of such frames alone.

    So the n-th frame of a kind on a link meets the same fate in every run, however threads interleave.

    Args:
        seed: any integer.
        rates: by frame kind.
        schedule: (frame kind, n) -> the fault of the n-th (from 0) frame of that kind on every link.
        longest: upper bound of a delay, in seconds.
    """

    def __init__(
        self,
        seed: int = 0,
        rates: Mapping[FrameKind, Rates] | None = None,
        schedule: Mapping[tuple[FrameKind, int], Fault] | None = None,
        longest: float = 0.02,
    ) -> None:
        self._seed = seed
        self._rates: dict[int, Rates] = {**rates} if rates else {}
        self._schedule: dict[tuple[int, int], Fault] = {**schedule} if schedule else {}
        self._longest = longest
        self._streams: dict[tuple[str, int], Random] = {}
        self._seen: Counter[tuple[str, int]] = Counter()
        self.counts: Counter[tuple[int, Fault]] = Counter()
        """What was done so far, by (frame kind, fault)."""

    def strike(self, link: str, kind: int) -> list[Delivery]:
        """The arrivals of the next frame of ``kind`` on ``link``: none, one or two."""
        chosen, wait = self._choose(link, kind)
        if Fault.DROP in chosen:
            chosen = {Fault.DROP}
        for fault in chosen:
            self.counts[kind, fault] += 1
        if Fault.DROP in chosen:
            return []
        late = bool(chosen & {Fault.DELAY, Fault.REORDER})
        first = Delivery(wait if late else 0.0, ordered=Fault.REORDER not in chosen)
        return [first, Delivery(first.delay + wait, ordered=False)] if Fault.DUPLICATE in chosen else [first]

    def _choose(self, link: str, kind: int) -> tuple[set[Fault], float]:
        key = (link, kind)
        stream = self._streams.setdefault(key, Random(f"{self._seed}/{link}/{kind}"))
        number = self._seen[key]
        self._seen[key] += 1
        rates = self._rates.get(kind, Rates())
        # Always the same number of draws, so that changing one rate leaves the fate of other frames alone.
        chosen = {fault for fault in Fault if stream.random() < getattr(rates, fault)}
        wait = stream.uniform(0, self._longest)
        scheduled = self._schedule.get((kind, number))
        return ({scheduled} if scheduled else chosen), wait
