"""Who leads: one scheduler at a time, by a key that expires.

The lease is a key in a bucket whose time to live counts from the last write: creating the key takes it, rewriting
it by revision renews it, silence ends it. Every leadership has an epoch of its own, one higher than the last. A leader
that was paused may still believe in its lease; its writes then fail, because its successor has rewritten the placement.
"""

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass

from shared.messages import Subjects
from shared.store import Store

EPOCH_KEY = "epoch"
RENEWALS = 4
"""Renewals per lease: three may be lost."""

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Lease:
    epoch: int
    revision: int
    until: float
    """Clock time at which others may take over."""


class Leader:
    """The lease as one scheduler sees it; ``step`` is called every ``interval`` seconds.

    ``leases``: the bucket whose keys expire. ``state``: the bucket that holds the epoch. ``holder``: unique
    per process.
    """

    def __init__(self, leases: Store, state: Store, holder: str, clock: Callable[[], float] = time.monotonic) -> None:
        if not leases.ttl:
            raise ValueError(f"keys of bucket {leases.bucket} do not expire")
        self._leases = leases
        self._state = state
        self._holder = holder.encode()
        self._clock = clock
        self._ttl = leases.ttl
        self._lease: Lease | None = None

    @property
    def interval(self) -> float:
        return self._ttl / RENEWALS

    @property
    def epoch(self) -> int | None:
        """Epoch of the leadership that this scheduler holds now; None while it does not lead."""
        lease = self._lease
        return lease.epoch if lease and self._clock() < lease.until else None

    async def step(self) -> None:
        """Renew the lease or try to take it.

        Raises BusUnavailable; the lease then still counts until it would expire.
        """
        now = self._clock()
        lease = self._lease
        revision = await self._hold(lease.revision if lease else None)
        epoch = lease.epoch if lease and revision else None
        if revision and not lease:
            epoch = await self._next_epoch()
            log.info("leading, epoch %s", epoch)
        self._lease = Lease(epoch, revision, now + self._ttl) if epoch and revision else None

    async def release(self) -> None:
        """Give the lease back, so that another scheduler need not wait for its end."""
        if self._lease:
            await self._leases.delete(Subjects.LEADER_KEY, self._lease.revision)
            self._lease = None

    async def _hold(self, revision: int | None) -> int | None:
        """Renew or take the key; its new revision, or None while somebody else holds it."""
        if revision:
            written = await self._leases.update(Subjects.LEADER_KEY, self._holder, revision)
        else:
            written = await self._leases.create(Subjects.LEADER_KEY, self._holder)
        if written:
            return written
        # A write of ours whose answer was lost may have moved the revision.
        found = await self._leases.get(Subjects.LEADER_KEY)
        return found[1] if found and found[0] == self._holder else None

    async def _next_epoch(self) -> int | None:
        """Count this leadership; None when another one was counted meanwhile."""
        found = await self._state.get(EPOCH_KEY)
        epoch = int(found[0]) + 1 if found else 1
        value = str(epoch).encode()
        write = self._state.update(EPOCH_KEY, value, found[1]) if found else self._state.create(EPOCH_KEY, value)
        return epoch if await write else None
