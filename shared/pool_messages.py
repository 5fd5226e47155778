"""Messages about the sizes of the pools: what is stored, what a person asks for, what `moemesh up` is told to do.

Like those of shared/messages.py. Counts that a person gives are plain numbers here, so that the scheduler can refuse
them in words.
"""

from pydantic import Field

from shared.messages import U64, Count, Message, Pool


class Wish(Message):
    """How many instances of one pool there should be, and who said so."""

    count: Count
    author: str
    """Id of the scheduler that wrote it."""
    reason: str
    """One line for a person."""
    time: float
    """Seconds since 1970."""


class DesiredPools(Message):
    """All that is stored about the sizes of the pools, under one key, by compare-and-set."""

    epoch: U64
    """Epoch of the leader that wrote it last."""
    wishes: dict[Pool, Wish] = Field(default_factory=dict)
    """A pool that is not in it stays as it was started."""

    @property
    def counts(self) -> dict[Pool, int]:
        return {pool: wish.count for pool, wish in self.wishes.items()}


class Scale(Message):
    """Person -> leading scheduler, request/reply with ScalePlan: have so many instances of a pool."""

    pool: Pool
    count: int
    dry_run: bool = False


class ScalePlan(Message):
    """Reply to Scale: what will happen."""

    actuator: str
    present: Count
    """Instances that start or are READY; those that are leaving do not count."""
    notes: tuple[str, ...] = ()
    """What a person should know before."""


class Resize(Message):
    """Scheduler -> ``moemesh up``, request/reply with Resized: have so many processes of a pool."""

    pool: Pool
    count: int


class Resized(Message):
    """Reply to Resize, once those that were too many have drained and ended."""

    names: tuple[str, ...]
    """The processes that the pool has now."""
