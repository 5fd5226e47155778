"""Which way an exchange goes: phases and the side of the gate, by a cost table. Pure; the caller measures.

The paper publishes no threshold (JANUS, section 3.3), so the table is ours: measured links give a first estimate of
every way, trials of the best few decide, and a trial is repeated when times drift.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from statistics import median
from typing import NamedTuple


class Phase(StrEnum):
    """How rows get from the members of a group to experts, and parts back."""

    ONE = "one"
    """Every member to every instance."""
    DIRECT = "direct"
    """Two-phase, case 1: the leader gathers, then one transfer to each instance."""
    RELAY = "relay"
    """Two-phase, case 2: the leader gathers, then one transfer to each other node, whose relay passes it on."""


class Gate(StrEnum):
    EXPERTS = "experts"
    """Every instance gets all rows and gates them."""
    ATTENTION = "attention"
    """The sender gates; rows go only where they are needed."""


class Way(NamedTuple):
    phase: Phase = Phase.ONE
    gate: Gate = Gate.EXPERTS

    def __str__(self) -> str:
        return f"{self.phase}/{self.gate}"

    def straight(self) -> "Way":
        """Without relays, and without other members."""
        return Way(Phase.DIRECT, self.gate)


SOLO = Way(Phase.DIRECT, Gate.EXPERTS)
"""All rows to every instance; what remains where there is neither a group nor another node."""
APART = Way(Phase.ONE, Gate.ATTENTION)
"""Every member of a group gates its own rows: no exchange of the group, but one for each member."""
ALL_WAYS = tuple(Way(phase, gate) for phase in Phase for gate in Gate)


class Link(NamedTuple):
    """What a message between two instances costs, in seconds."""

    latency: float
    """From the end of sending to arrival."""
    occupancy: float
    """Of the sender, per message."""
    per_byte: float

    def sends(self, messages: float, nbytes: float) -> float:
        """Time until so many messages with so many bytes in all have left the sender."""
        return messages * self.occupancy + nbytes * self.per_byte


NEAR = Link(20e-6, 15e-6, 1 / 5e9)
"""Shared memory, until it has been measured."""


class Node(NamedTuple):
    """Expert instances of one node that an exchange asks."""

    instances: int
    link: Link
    near: bool
    """True: it is the asking group's own node."""


class Shape(NamedTuple):
    """What the cost of an exchange depends on, beside the way."""

    rows: int
    """Of all members."""
    members: int
    nodes: tuple[Node, ...]
    """None while no expert instance is live."""
    hidden: int
    top_k: int
    inside: Link = NEAR
    """Between instances of one node."""


PART_EXTRA = 12
GATE_S = 40e-6
"""What routes cost the sender, beside what experts would spend on the same; trials correct it."""


def ways_for(shape: Shape, phase: Phase | None = None, gate: Gate | None = None) -> list[Way]:
    """The ways that differ for such an exchange; ``phase``, ``gate``: no others."""
    far = [node for node in shape.nodes if not node.near]
    relays = any(node.instances > 1 for node in far)
    pays = {Phase.ONE: shape.members > 1, Phase.DIRECT: True, Phase.RELAY: relays}
    ways = [way for way in ALL_WAYS if pays[way.phase] and phase in (None, way.phase) and gate in (None, way.gate)]
    # Where members choose for their own rows alone, experts are read twice: only a slower link can make up for it.
    return [way for way in ways if gate or far or way != APART] or [SOLO._replace(gate=gate or Gate.EXPERTS)]


def predict(way: Way, shape: Shape) -> float:
    """Seconds of one exchange beside the experts' own time, from links alone."""
    if way.phase is Phase.ONE:
        return _one_phase(way, shape)
    share = shape.rows * (1 - 1 / shape.members)
    inside = 2 * (shape.inside.sends(shape.members - 1, share * 4 * shape.hidden) + shape.inside.latency)
    return _from_leader(way, shape) + (inside if shape.members > 1 else 0.0)


def _needed(way: Way, shape: Shape, instances: int) -> float:
    """Expected rows that go to a destination with so many of the instances."""
    if way.gate is Gate.EXPERTS:
        return shape.rows
    fraction = instances / sum(node.instances for node in shape.nodes)
    return shape.rows * (1 - (1 - fraction) ** shape.top_k)


def _one_phase(way: Way, shape: Shape) -> float:
    """A node's members share its link, so all bytes pass it one after the other; messages leave in parallel."""
    there = back = 0.0
    for node in shape.nodes:
        rows = _needed(way, shape, 1)
        there += node.link.sends(node.instances, node.instances * rows * 4 * shape.hidden)
        back += node.link.sends(0, _parts_bytes(shape, node.instances))
    occupied = max((node.link.occupancy for node in shape.nodes), default=0.0) * shape.members
    received = shape.inside.occupancy * sum(node.instances for node in shape.nodes)
    return there + back + occupied + received + 2 * _latency(shape) + _gating(way)


def _from_leader(way: Way, shape: Shape) -> float:
    there = back = passing = 0.0
    messages = 0
    for node in shape.nodes:
        relayed = way.phase is Phase.RELAY and not node.near and node.instances > 1
        transfers = 1 if relayed else node.instances
        rows = _needed(way, shape, node.instances // transfers)
        there += node.link.sends(transfers, transfers * rows * 4 * shape.hidden)
        back += node.link.sends(0, _parts_bytes(shape, node.instances))
        messages += transfers
        if relayed:
            inner = shape.inside.sends(node.instances - 1, (node.instances - 1) * rows * 4 * shape.hidden)
            merging = shape.inside.sends(node.instances - 1, _parts_bytes(shape, node.instances))
            passing = max(passing, inner + merging + 2 * shape.inside.latency)
    occupied = max((node.link.occupancy for node in shape.nodes), default=0.0) + shape.inside.occupancy * messages
    return there + back + passing + occupied + 2 * _latency(shape) + _gating(way)


def _parts_bytes(shape: Shape, instances: int) -> float:
    """Of the replies of so many instances."""
    fraction = instances / sum(node.instances for node in shape.nodes)
    return shape.rows * shape.top_k * fraction * (4 * shape.hidden + PART_EXTRA)


def _latency(shape: Shape) -> float:
    return max((node.link.latency for node in shape.nodes), default=0.0)


def _gating(way: Way) -> float:
    return GATE_S if way.gate is Gate.ATTENTION else 0.0


UNDISTURBED = 4
"""Steps of a size before its first trial."""
HOPELESS = 3.0
"""Ways that are estimated to take so many times the best are not tried."""
ROUNDS = 4
"""Steps of each candidate in a trial, in turns; the first does not count."""
CLOSE = 1.25
"""Candidates that took at most so many times the best go on to the final,"""
FINAL = 24
"""until each has had so many steps."""
TRIAL_EVERY = 4096
WINS = 0.97
DRIFT = 1.5
"""Another trial when times have left those of the last one by this factor, either way."""
SMOOTH = 0.1
OUTLIER = 4.0
"""Times longer than so many of the last trial's count as that: one hiccup starts no trial."""
MOST_SIZES = 256


@dataclass
class _Size:
    """What is known of steps of about the same number of rows."""

    candidates: list[Way]
    best: Way
    times: dict[Way, list[float]] = field(default_factory=dict)
    decided: dict[Way, float] = field(default_factory=dict)
    """Medians of the last trial."""
    recent: float = 0.0
    steps: int = 0
    used: int = 0
    """When it was chosen for last: a count of choices."""

    @property
    def in_trial(self) -> bool:
        return len(self.candidates) > 1 and self.steps >= UNDISTURBED

    def contenders(self) -> list[Way]:
        """Ways that have steps left in the trial; none: it is over."""
        if first := [way for way in self.candidates if len(self.times.get(way, ())) < ROUNDS]:
            return first
        early = {way: median(times[1:ROUNDS]) for way, times in self.times.items()}
        limit = CLOSE * min(early.values())
        finalists = [way for way in self.candidates if early[way] <= limit]
        return [way for way in finalists if len(self.times[way]) < FINAL] if len(finalists) > 1 else []

    def turn(self) -> Way:
        """Whose turn it is in a trial."""
        return min(self.contenders(), key=lambda way: len(self.times.get(way, ())))


class Row(NamedTuple):
    """One line of the cost table."""

    rows: int
    """Exchanges of this many rows or fewer, and more than half as many."""
    members: int
    way: Way
    predicted: float
    measured: float | None
    """Seconds per exchange in the last trial, experts' time included."""
    chosen: bool


class Ways:
    """The cost table of one attention instance.

    Args:
        phase, gate: fixed; None: whatever measures best.
    """

    def __init__(self, phase: Phase | None = None, gate: Gate | None = None) -> None:
        self._phase, self._gate = phase, gate
        self._sizes: dict[Shape, _Size] = {}
        self._choices = 0

    def forget(self) -> None:
        """Links have changed: all sizes are tried again."""
        self._sizes.clear()

    def choose(self, shape: Shape) -> Way:
        """The way of the next step of such exchanges."""
        size = self._size(shape)
        self._choices += 1
        size.used = self._choices
        return size.turn() if size.in_trial else size.best

    def observe(self, shape: Shape, way: Way, seconds: float) -> None:
        """A step went this way, and an exchange of it took so long, repeats included: what fails is slow."""
        size = self._size(shape)
        if way not in size.candidates:  # whoever formed the group chose it by another table
            return
        if size.in_trial:
            if way in size.contenders():
                size.times.setdefault(way, []).append(seconds)
            if not size.contenders():
                self._decide(size)
            return
        size.steps += 1
        if way == size.best and size.decided:
            usual = size.decided[way]
            size.recent += SMOOTH * (min(seconds, OUTLIER * usual) - size.recent)
            if not usual / DRIFT < size.recent < usual * DRIFT:
                size.steps = max(size.steps, UNDISTURBED)

    def table(self) -> list[Row]:
        """For a person and for metrics; of shapes that differ in their nodes alone, the one that was used last."""
        by_use = sorted(self._sizes.items(), key=lambda item: item[1].used)
        latest = {(shape.rows, shape.members): (shape, size) for shape, size in by_use}
        return [row for key in sorted(latest) for row in self._rows(*latest[key])]

    def _rows(self, shape: Shape, size: _Size) -> Iterable[Row]:
        for way in size.candidates:
            measured = size.decided.get(way)
            yield Row(shape.rows, shape.members, way, predict(way, shape), measured, way == size.best)

    def _size(self, shape: Shape) -> _Size:
        key = shape._replace(rows=1 << (shape.rows - 1).bit_length())
        if key not in self._sizes:
            candidates = self._promising(key)
            self._sizes[key] = _Size(candidates, candidates[0])
            if len(self._sizes) > MOST_SIZES:
                del self._sizes[next(iter(self._sizes))]
        return self._sizes[key]

    def _promising(self, shape: Shape) -> list[Way]:
        costs = {way: predict(way, shape) for way in ways_for(shape, self._phase, self._gate)}
        ranked = sorted(costs, key=lambda way: costs[way])
        if shape.members == 1 and all(node.near for node in shape.nodes):
            return [SOLO._replace(gate=self._gate or Gate.EXPERTS)]  # nothing to save: no trials
        return [way for way in ranked if costs[way] <= HOPELESS * costs[ranked[0]]]

    @staticmethod
    def _decide(size: _Size) -> None:
        size.decided = {way: median(times[1:]) for way, times in size.times.items()}
        best = min(size.decided, key=lambda way: size.decided[way])
        if best != size.best and size.decided[best] < WINS * size.decided[size.best]:
            size.best = best
        size.times, size.recent, size.steps = {}, size.decided[size.best], UNDISTURBED - TRIAL_EVERY


def link_of(
    round_trips: Sequence[float], bursts: Sequence[tuple[int, float]], bulk: Sequence[tuple[int, float]]
) -> Link:
    """A link from measured times, in seconds.

    Args:
        round_trips: of single empty messages.
        bursts: (messages sent back to back, time until the last was answered).
        bulk: (bytes, round trip of a message with so many, whose answer is empty).
    """
    alone = min(round_trips)
    occupancy = max(0.0, min((seconds - alone) / (count - 1) for count, seconds in bursts))
    per_byte = max(0.0, min((seconds - alone) / nbytes for nbytes, seconds in bulk))
    return Link(max(0.0, alone / 2 - occupancy), occupancy, per_byte)
