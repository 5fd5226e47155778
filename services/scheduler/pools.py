"""How many instances each pool should have: what may be asked for, and which change the actuator makes next. Pure."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from services.scheduler.placement import TooFewSlots, room
from shared.errors import Refused
from shared.membership import Member
from shared.messages import MAX_EXPERT_INSTANCES, ModelFacts, Pool, State
from shared.pool_messages import Wish

FEWEST = {Pool.ATTENTION: 1, Pool.EXPERTS: 0}
"""Without an attention instance nobody keeps requests; without experts they wait, and go on when the pool is back."""
RETRY_S = 2.0
"""After the first failure of a change; every further one doubles the wait."""
LONGEST_RETRY_S = 60.0
AGAIN_S = 60.0
"""So long instances may take to come or go before the actuator is asked for the same again."""
LONGEST_S = 180.0
"""So long a change may take before whoever decides on sizes goes on without waiting for it."""
BY_HAND = "by hand"
"""Reason of what a person has asked for."""


@dataclass(frozen=True)
class Change:
    """What the actuator is asked for."""

    pool: Pool
    count: int


@dataclass(frozen=True)
class Asked:
    """How the latest request of a pool has ended."""

    count: int
    at: float
    """Clock time, in seconds, at which it ended."""
    failures: int = 0
    """In a row, for this count."""

    @property
    def again_at(self) -> float:
        """Clock time at which the same may be asked again."""
        wait = RETRY_S * 2.0 ** min(self.failures - 1, 10) if self.failures else AGAIN_S
        return self.at + min(wait, LONGEST_RETRY_S)


def present(members: Sequence[Member]) -> dict[Pool, int]:
    """Instances of each pool that start or are READY; those that are leaving do not count."""
    there = [m.heartbeat.kind for m in members if m.heartbeat.state in (State.STARTING, State.READY)]
    return {pool: there.count(pool.kind) for pool in Pool}


def next_change(
    desired: Mapping[Pool, int], there: Mapping[Pool, int], asked: Mapping[Pool, Asked], now: float
) -> Change | None:
    """The one change to make now, if any; a pool that grows goes before one that shrinks.

    Args:
        desired: pools that nobody has asked for are not in it, and stay as they are.
        there: see ``present``.
        asked: the latest request of each pool. Counts are absolute, so that asking again does no harm.
        now: clock time, in seconds.
    """
    due = [pool for pool, count in desired.items() if count != there[pool] and _due(count, asked.get(pool), now)]
    first = max(due, key=lambda pool: desired[pool] - there[pool], default=None)
    return None if first is None else Change(first, desired[first])


def _due(count: int, asked: Asked | None, now: float) -> bool:
    return asked is None or asked.count != count or now >= asked.again_at


def check(pool: Pool, count: int, members: Sequence[Member], model: ModelFacts | None) -> None:
    """Whether a pool may have so many instances.

    Args:
        members: everybody.
        model: the one that is served, None when that is not known.

    Raises Refused, and TooFewSlots when so few expert instances cannot hold the model.
    """
    least = FEWEST[pool]
    if count < least:
        raise Refused("invalid", f"{pool}: {count} instances; there must be at least {least}")
    if pool is Pool.EXPERTS and count > MAX_EXPERT_INSTANCES:
        raise Refused("invalid", f"{pool}: {count} instances; a placement takes at most {MAX_EXPERT_INSTANCES}")
    ready = [m for m in members if m.heartbeat.kind is pool.kind and m.ready]
    if pool is Pool.EXPERTS and count and ready and model:
        _check_slots(count, room(ready, model), model.experts)


def _check_slots(count: int, slots: int, experts: int) -> None:
    if count * slots < experts:
        raise TooFewSlots(
            f"{count} expert instances with {slots} slots per layer cannot hold {experts} experts: "
            f"it takes {-(-experts // slots) if slots else 'more slots and'} instances at least"
        )


def notes(pool: Pool, count: int) -> tuple[str, ...]:
    """What a person should know before."""
    if pool is Pool.EXPERTS and count == 0:
        return ("without expert instances requests wait, and fail after --no-home-deadline of the attention pool",)
    return ()


def unfinished(wishes: Mapping[Pool, Wish], members: Sequence[Member], now: float) -> str:
    """Which change is under way, for a person; empty: none. After LONGEST_S it does not hold up others any more.

    ``now``: seconds since 1970, as in a wish.
    """
    for pool, wish in wishes.items():
        states = [m.heartbeat.state for m in members if m.heartbeat.kind is pool.kind]
        if states != [State.READY] * wish.count and now - wish.time < LONGEST_S:
            leaving = f", {states.count(State.DRAINING)} drain" if State.DRAINING in states else ""
            return f"{pool}: {states.count(State.READY)} of {wish.count} are ready{leaving}"
    return ""


def by_hand(wishes: Mapping[Pool, Wish], seconds: float, now: float) -> str:
    """Who has asked for a size less than so long ago, for a person; empty: nobody. ``now``: seconds since 1970."""
    for pool, wish in wishes.items():
        if wish.reason == BY_HAND and now - wish.time < seconds:
            return f"{pool}: {wish.count} by hand, kept for {wish.time + seconds - now:.0f} s more"
    return ""
