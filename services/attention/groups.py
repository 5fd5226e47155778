"""Who runs a step together: attention instances of one node whose rows then form one exchange per layer. Pure.

The instance with the lowest id is the node's meeting place, whether it has work or not: those that begin a step say so
there and are told their group. It waits for those that were there the last time, for a share of a step at most.
"""

import struct
from collections.abc import Container, Iterable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, Self

from services.attention.ways import ALL_WAYS, Way

SHORTEST_WAIT_S = 0.0003
LONGEST_WAIT_S = 0.02
LONGEST_PATIENCE_S = 1.0
"""However long a step has taken, nobody waits longer for its end."""
LONGEST_EXCHANGE_S = 600.0
MOST_SKIPPED = 32
"""Steps without a meeting, after meetings to which nobody else came, or groups that broke."""


class Join(NamedTuple):
    """An instance is about to begin a step."""

    incarnation: int
    number: int
    """Of its joins; the answer carries it, for one that comes late is of no use to the next."""
    rows: int
    placement: int
    """Version that it uses."""
    live: int
    until: float
    """Monotonic time at which it goes on alone."""

    LAYOUT = struct.Struct("<II")

    @classmethod
    def pack(cls, rows: int, patience: float) -> bytes:
        return cls.LAYOUT.pack(rows, int(patience * 1e6))

    @classmethod
    def unpack(cls, meta: bytes) -> tuple[int, float]:
        """rows, patience in seconds. Raises struct.error, or ValueError when there are no rows."""
        rows, patience = cls.LAYOUT.unpack(meta)
        if not rows:
            raise ValueError("who joins has rows")
        return rows, min(patience * 1e-6, LONGEST_PATIENCE_S)


class Observed(NamedTuple):
    """What a step of a group took: told to the meeting place by the group's leader, if that had no part in it.

    By every member, if exchanges were their own (``ways.APART``).
    """

    rows: int
    members: int
    way: Way
    seconds: float
    """Per exchange."""

    LAYOUT = struct.Struct("<IIId")

    def pack(self) -> bytes:
        return self.LAYOUT.pack(self.rows, self.members, ALL_WAYS.index(self.way), self.seconds)

    @classmethod
    def unpack(cls, meta: bytes) -> Self:
        """Raises struct.error, IndexError, or ValueError for what no step takes."""
        rows, members, way, seconds = cls.LAYOUT.unpack(meta)
        if not (rows and members > 1 and 0 < seconds < LONGEST_EXCHANGE_S):
            raise ValueError("no step of a group")
        return cls(rows, members, ALL_WAYS[way], seconds)


class Group(NamedTuple):
    """Instances that run a step together: rows in this order, one placement version and live mask for all."""

    number: int
    """64 bits, of this step alone."""
    members: tuple[tuple[int, int], ...]
    """(incarnation, rows); the first one leads."""
    way: Way
    placement: int
    live: int

    @property
    def leader(self) -> int:
        return self.members[0][0]

    @property
    def total(self) -> int:
        return sum(rows for _, rows in self.members)

    def first(self, incarnation: int) -> int:
        """Number of a member's first row."""
        names = [name for name, _ in self.members]
        return sum(rows for _, rows in self.members[: names.index(incarnation)])

    def suits(self, join: Join, max_rows: int, known: Container[int]) -> bool:
        """Whether one that has asked with ``join`` can take part, who can reach those in ``known``."""
        others = [name for name, _ in self.members if name != join.incarnation]
        return (
            (join.incarnation, join.rows) in self.members
            and (join.placement, join.live) == (self.placement, self.live)
            and len({*others}) == len(self.members) - 1
            and all(name in known for name in others)
            and all(rows > 0 for _, rows in self.members)
            and self.total <= max_rows
        )

    def pack(self) -> bytes:
        words = [word for member in self.members for word in member]
        return struct.pack(f"<I{len(words)}Q", ALL_WAYS.index(self.way), *words)

    @classmethod
    def unpack(cls, number: int, placement: int, live: int, meta: bytes) -> Self:
        """Raises struct.error, ValueError or IndexError when ``meta`` is no group's."""
        count = (len(meta) - 4) // 16
        way, *words = struct.unpack(f"<I{2 * count}Q", meta)
        if count < 2:
            raise ValueError("a group has two members or more")
        return cls(number, tuple(zip(words[::2], words[1::2], strict=True)), ALL_WAYS[way], placement, live)


@dataclass
class Meeting:
    """The meeting place of a node. ``max_rows``: of an exchange."""

    max_rows: int
    joins: dict[int, Join] = field(default_factory=dict)
    expected: set[int] = field(default_factory=set)
    """Incarnations that are waited for."""
    newest: dict[int, int] = field(default_factory=dict)
    """Number of the last join of each."""
    due: float = 0.0
    """When the next group is formed at the latest; only while there are joins."""

    def join(self, join: Join, now: float, wait: float) -> bool:
        """False: it is a late copy of an earlier one."""
        if join.number <= self.newest.get(join.incarnation, 0):
            return False
        if not self.joins:
            self.due = now + wait
        self.joins[join.incarnation] = join
        self.newest[join.incarnation] = join.number
        self.expected.add(join.incarnation)
        return True

    def leave(self, incarnations: Iterable[int]) -> None:
        """They are gone."""
        for incarnation in incarnations:
            self.joins.pop(incarnation, None)
            self.newest.pop(incarnation, None)
            self.expected.discard(incarnation)

    def complete(self, now: float) -> bool:
        """Whether there is nobody to wait for any more."""
        here = {join.incarnation for join in self.joins.values() if join.until > now}
        return bool(self.joins) and (now >= self.due or self.expected <= here)

    def form(self, order: Sequence[int], now: float) -> list[list[Join]]:
        """Groups of those who have joined, members in the given order of incarnations; then nobody has joined.

        Only those with the same placement and live mask go together, as many as an exchange may have rows. One that
        has waited too long is alone already. Those who have not come are not expected the next time.
        """
        waiting = [self.joins[i] for i in order if i in self.joins and self.joins[i].until > now]
        self.expected = set(self.joins)
        self.joins = {}
        groups: list[list[Join]] = []
        for join in waiting:
            fitting = [g for g in groups if _alike(g[0], join) and _rows(g) + join.rows <= self.max_rows]
            if fitting:
                fitting[0].append(join)
            else:
                groups.append([join])
        return groups


def _alike(one: Join, other: Join) -> bool:
    return (one.placement, one.live) == (other.placement, other.live)


def _rows(group: Sequence[Join]) -> int:
    return sum(join.rows for join in group)


class Patience:
    """How often an instance goes to meetings: seldom when nobody else comes or groups break, else every time."""

    def __init__(self) -> None:
        self._skip = self._left = 0

    def goes(self) -> bool:
        if self._left:
            self._left -= 1
            return False
        return True

    def came_back(self, grouped: bool) -> None:
        self._skip = 0 if grouped else min(max(1, 2 * self._skip), MOST_SKIPPED)
        self._left = self._skip


def patience_for(last_step: float) -> float:
    """Seconds for which one is asked to wait until the step that is under way ends, so that it need not go alone."""
    return min(max(1.5 * last_step, SHORTEST_WAIT_S), LONGEST_PATIENCE_S)


def longest_wait(share: float, last_step: float) -> float:
    """Seconds that a meeting waits: a share of the last step, within bounds."""
    return min(max(share * last_step, SHORTEST_WAIT_S), LONGEST_WAIT_S)
