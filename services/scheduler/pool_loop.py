"""The loop that makes the pools as large as somebody has asked: one change at a time, by the actuator.

What is desired lies in the store, written by the leading scheduler by compare-and-set, so that its successor goes on
with it. Decides by pure functions (pools.py). Nothing is desired until somebody says so.
"""

import asyncio
import logging
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any

from services.scheduler.actuators.base import Actuator, ActuatorFailed
from services.scheduler.leader import Leader
from services.scheduler.placement import TooFewSlots
from services.scheduler.pools import BY_HAND, Asked, Change, check, next_change, notes, present
from shared.errors import BadMessage, BusUnavailable, Refused
from shared.lifecycle import Instance
from shared.messages import Pool, PoolFacts, Subjects
from shared.metrics import Sample, sample
from shared.pool_messages import DesiredPools, Scale, ScalePlan, Wish
from shared.store import Store

LOOK_S = 1.0
SETTLE_S = 10.0
"""A scheduler that has just started leaves what was desired before alone for so long: instances may be on their way."""
WRITES = 3
"""Attempts to write what somebody has asked for, when others write too."""

log = logging.getLogger(__name__)


class PoolLoop:
    """Make it, then ``start``. Belongs to the asyncio thread.

    Args:
        actuator: None: sizes cannot be changed, and whoever asks for it is refused.
        name: of the actuator, as in the settings.
    """

    _store: Store
    _running: asyncio.Task[None]

    def __init__(self, instance: Instance, leader: Leader, actuator: Actuator | None, name: str) -> None:
        self.desired: DesiredPools | None = None
        """As it was last read or written here; None: not known yet."""
        self.notes: tuple[str, ...] = ()
        """What whoever scales by hand should know besides."""
        self._instance = instance
        self._leader = leader
        self._actuator = actuator
        self._name = name
        self._asked: dict[Pool, Asked] = {}
        self._problems: dict[Pool, str] = {}
        self._changes: Counter[tuple[Pool, str]] = Counter()
        self._changed = asyncio.Event()
        self._settled_at = time.monotonic() + SETTLE_S
        self._fresh: set[Pool] = set()  # asked for since this scheduler started
        self._stopping = False

    async def start(self) -> None:
        """Listen to people, and keep looking in the background. Raises BusUnavailable."""
        instance = self._instance
        self._store = await instance.bus.store(instance.subjects.bucket)
        instance.members.on_change(self._changed.set)
        instance.telemetry.collect(self.samples)
        instance.pages["/desired"] = self.page
        await instance.bus.subscribe(instance.subjects.scheduler("scale"), Scale, self._by_hand)
        self._running = instance.spawn(self._run(), "pools")

    async def stop(self) -> None:
        """End the loop; the next leader asks again for a change that was under way."""
        self._stopping = True  # nats-py may drop the cancellation
        self._running.cancel()
        await asyncio.wait([self._running])
        if self._actuator:
            await self._actuator.close()

    @property
    def problem(self) -> str:
        """One line about changes that have failed; empty when none has."""
        return "; ".join(self._problems.values())

    def facts(self) -> dict[str, Any]:
        """Heartbeat fields."""
        if self.desired is None or self._leader.epoch is None:
            return {}
        counts = self.desired.counts.items()
        return {"pools": tuple(PoolFacts(pool=p, desired=n, problem=self._problems.get(p, "")) for p, n in counts)}

    def page(self) -> Mapping[str, Any] | None:
        """``/desired``: pool -> instances that there should be; read in another thread."""
        return None if self.desired is None else {pool.value: n for pool, n in self.desired.counts.items()}

    def samples(self) -> Iterator[Sample]:
        """For /metrics; read in another thread."""
        for pool, count in (self.desired.counts if self.desired else {}).items():
            yield sample("desired_instances", count, pool=pool.value)
        for (pool, outcome), count in self._changes.copy().items():
            yield sample("pool_changes", count, pool=pool.value, outcome=outcome)

    # ---- what is desired --------------------------------------------------------------------------------

    async def want(self, counts: Mapping[Pool, int], reason: str) -> None:
        """Desire other sizes of pools; they are made in the background. Raises Refused."""
        self._check(counts)
        try:
            await self._desire(counts, reason)
        except BusUnavailable as error:
            raise Refused("not_now", f"what is desired could not be stored: {error}") from error
        for pool in counts:
            self._asked.pop(pool, None)
            self._problems.pop(pool, None)
            self._fresh.add(pool)
        await self._instance.announce()
        self._changed.set()

    def _check(self, counts: Mapping[Pool, int]) -> None:
        """Raises Refused."""
        if self._actuator is None:
            raise Refused(
                "not_now",
                "nobody starts and stops instances here: set the scheduler's --actuator (MOEMESH_ACTUATOR) to local, "
                "compose, kubernetes or external",
            )
        members = self._instance.members.all()
        model = next((m.heartbeat.model for m in members if m.ready and m.heartbeat.model), None)
        try:
            for pool, count in counts.items():
                check(pool, count, members, model)
        except TooFewSlots as error:
            raise Refused("invalid", str(error)) from error

    async def _desire(self, counts: Mapping[Pool, int], reason: str) -> None:
        """Write it, beside what is desired of the other pools. Raises BusUnavailable, Refused."""
        said = {"author": self._instance.id, "reason": reason, "time": time.time()}
        wishes = {pool: Wish(count=count, **said) for pool, count in counts.items()}
        for _ in range(WRITES):
            stored, revision = await self._read()
            epoch = self._leader.epoch
            if epoch is None or (stored and stored.epoch > epoch):
                raise Refused("not_now", "another scheduler leads now; ask again")
            before = stored or self.desired or DesiredPools(epoch=epoch)
            if await self._write(DesiredPools(epoch=epoch, wishes=before.wishes | wishes), revision):
                return
        raise Refused("not_now", "somebody else changes what is desired; ask again")

    async def _by_hand(self, request: Scale) -> ScalePlan | None:
        """Raises Refused."""
        if self._leader.epoch is None:
            return None  # the scheduler that leads answers
        there = present(self._instance.members.all())[request.pool]
        counts = {request.pool: request.count}
        if request.dry_run:
            self._check(counts)
        else:
            await self.want(counts, BY_HAND)
        return ScalePlan(actuator=self._name, present=there, notes=(*notes(request.pool, request.count), *self.notes))

    # ---- the loop ---------------------------------------------------------------------------------------

    async def _run(self) -> None:
        while not self._stopping:
            try:
                async with asyncio.timeout(LOOK_S):
                    await self._changed.wait()
            except TimeoutError:
                pass
            self._changed.clear()
            try:
                await self._round()
            except BusUnavailable as error:
                log.warning("sizes of the pools stay: %s", error)

    async def _round(self) -> None:
        """Read what is stored, and make one change towards it, if we lead."""
        await self._follow()
        if self._leader.epoch is None or self._actuator is None or self.desired is None:
            return
        now, there = time.monotonic(), present(self._instance.members.all())
        settled = now >= self._settled_at
        counts = {pool: n for pool, n in self.desired.counts.items() if settled or pool in self._fresh}
        change = next_change(counts, there, self._asked, now)
        if change:
            await self._make(change, self._actuator)
        elif reached := [pool for pool in self._problems if counts.get(pool) == there[pool]]:
            for pool in reached:
                del self._problems[pool]
            await self._instance.announce()

    async def _follow(self) -> None:
        """Know what is stored; make it ours if we lead, so that a late write of a predecessor fails."""
        stored, revision = await self._read()
        known, epoch = stored or self.desired or DesiredPools(epoch=0), self._leader.epoch
        if epoch and known.wishes and (stored is None or stored.epoch < epoch):
            await self._write(known.model_copy(update={"epoch": epoch}), revision)
        else:
            self.desired = known

    async def _make(self, change: Change, actuator: Actuator) -> None:
        """Ask the actuator, and remember how that ended."""
        pool, count = change.pool, change.count
        before = self._asked.get(pool)
        new = before is None or before.count != count or before.failures > 0
        failures, problem = 0, ""
        try:
            await actuator.scale(pool, count)
        except ActuatorFailed as error:
            failures = 1 + (before.failures if before and before.count == count else 0)
            problem = f"{pool}: {count} wanted, attempt {failures} failed: {error}"
        self._asked[pool] = Asked(count, time.monotonic(), failures)
        self._changes[pool, "failed" if problem else "made"] += new
        if self.desired and self.desired.counts.get(pool) == count:  # else something else was asked for meanwhile
            await self._tell(change, problem)

    async def _tell(self, change: Change, problem: str) -> None:
        if problem:
            log.error("%s", problem)
            self._problems[change.pool] = problem
        else:
            log.info("%s: %s was asked for %d instances", change.pool, self._name, change.count)
            self._problems.pop(change.pool, None)
        await self._instance.announce()

    # ---- the store --------------------------------------------------------------------------------------

    async def _read(self) -> tuple[DesiredPools | None, int]:
        """What is stored and its revision, 0 when there is none. What cannot be read counts as none."""
        found = await self._store.get(Subjects.POOLS_KEY)
        if found is None:
            return None, 0
        try:
            return DesiredPools.decode(found[0]), found[1]
        except BadMessage as error:
            log.warning("key %s of bucket %s: %s", Subjects.POOLS_KEY, self._store.bucket, error)
            return None, found[1]

    async def _write(self, desired: DesiredPools, revision: int) -> bool:
        """False when somebody else has written since it was read."""
        value, key = desired.encode(), Subjects.POOLS_KEY
        write = self._store.update(key, value, revision) if revision else self._store.create(key, value)
        if await write is None:
            return False
        self.desired = desired
        return True
