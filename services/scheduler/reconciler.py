"""The loop that owns the placement: whenever the READY expert instances change, write the next version.

Leads by lease (leader.py), decides by pure functions (placement.py), writes by compare-and-set. Not on the token path:
when it dies, serving goes on with the last version, and another scheduler continues from the store.
"""

import asyncio
import logging
import time
from typing import Any, Literal, Self, get_args

from services.scheduler.leader import Leader
from services.scheduler.placement import next_placement
from shared.config import SchedulerConfig
from shared.errors import BusUnavailable
from shared.lifecycle import Instance
from shared.membership import HEARTBEAT_S, Member
from shared.messages import Kind, Placement, Subjects
from shared.metrics import Sample, sample
from shared.placement_watch import read_placement
from shared.store import Store

GATHER_S = 0.2
"""Instances that become READY together make one version."""
SETTLE_S = 2.5 * HEARTBEAT_S
"""A scheduler that has just started may not have heard everybody; until then nobody is taken for gone."""

RoundState = Literal["following", "settling", "waiting", "steady", "cut off"]
"""What a round came to: another scheduler leads; too early to judge; no expert instance; all is placed; no NATS."""

log = logging.getLogger(__name__)


class Reconciler:
    """Made by ``start``, which also sets the loop going."""

    _loop: asyncio.Task[None]

    def __init__(self, instance: Instance, config: SchedulerConfig, store: Store, leader: Leader) -> None:
        self.current: Placement | None = None
        """Newest placement that was read or written here."""
        self.leader = leader
        self.state: RoundState = "following"
        self.written = 0
        """Placements that were written here."""
        self._instance = instance
        self._homes, self._policy = config.homes, config.policy
        self._store = store
        self._changed = asyncio.Event()
        self._settled_at = time.monotonic() + SETTLE_S

    @classmethod
    async def start(cls, instance: Instance, config: SchedulerConfig) -> Self:
        """Raises BusUnavailable."""
        subjects = instance.subjects
        store = await instance.bus.store(subjects.bucket)
        leases = await instance.bus.store(subjects.leader_bucket, ttl=config.lease_s)
        leader = Leader(leases, store, f"{instance.id}/{instance.incarnation:016x}")
        reconciler = cls(instance, config, store, leader)
        instance.members.on_change(reconciler._changed.set)
        instance.bus.on_connection(lambda connected: reconciler._changed.set())
        instance.telemetry.collect(reconciler.samples)
        await reconciler._round()
        reconciler._loop = instance.spawn(reconciler._run(), "reconciler")
        return reconciler

    async def stop(self) -> None:
        """End the loop and give the lease back."""
        self._loop.cancel()
        await asyncio.wait([self._loop])
        try:
            await self.leader.release()
        except BusUnavailable as error:
            log.info("the lease ends by itself: %s", error)

    def facts(self) -> dict[str, Any]:
        """Heartbeat fields: announces the version, so that the others read it."""
        return {"placement": self.current.version if self.current else 0}

    def samples(self) -> list[Sample]:
        """For /metrics; read in another thread."""
        counts: dict[tuple[str, str], int] = {}
        for member in self._instance.members.all():
            key = (member.heartbeat.kind.value, member.heartbeat.state.value)
            counts[key] = counts.get(key, 0) + 1
        instances = [sample("instances", count, kind=kind, state=state) for (kind, state), count in counts.items()]
        states = [sample("reconciler_state", self.state == state, state=state) for state in get_args(RoundState)]
        epoch = self.leader.epoch
        return [
            *instances,
            *states,
            sample("placement_version", self.facts()["placement"]),
            sample("placements_written", self.written),
            sample("leader", epoch is not None),
            sample("leader_epoch", epoch or 0),
        ]

    async def _run(self) -> None:
        while True:
            try:
                async with asyncio.timeout(self.leader.interval):
                    await self._changed.wait()
                await asyncio.sleep(GATHER_S)
            except TimeoutError:
                pass
            self._changed.clear()
            try:
                await self._round()
            except BusUnavailable as error:
                self.state = "cut off"
                log.warning("no decision now: %s", error)

    async def _round(self) -> None:
        """Renew the lease, read what is stored, and write what should follow, if we lead."""
        await self.leader.step()
        placement, revision = await read_placement(self._store)
        newest = max(self._newest(), self.current.version if self.current else 0)
        self._remember(placement)
        epoch = self.leader.epoch
        if epoch is None or (placement and placement.epoch > epoch):
            self.state = "following"
            return
        if not self._may_judge(placement):
            self.state = "settling"
            return
        desired = self._desired(placement, epoch, newest)
        if desired and await self._write(desired, revision):
            self._remember(desired)
            self.written += 1
            await self._instance.announce()
        self.state = "steady" if self._instance.members.ready(Kind.EXPERTS) else "waiting"

    def _desired(self, placement: Placement | None, epoch: int, newest: int) -> Placement | None:
        """The next version; or the stored one with our epoch, which makes a late write of our predecessor fail."""
        ready = self._instance.members.ready(Kind.EXPERTS)
        following = next_placement(placement, ready, self._homes, self._instance.id, epoch, newest, self._policy)
        if following:
            log.info("placement %d: %s", following.version, following.reason)
        elif placement and placement.epoch < epoch:
            return placement.model_copy(update={"epoch": epoch})
        return following

    async def _write(self, placement: Placement, revision: int) -> bool:
        """False when somebody else has written since it was read; the next round sees it."""
        value = placement.encode()
        if revision == 0:
            return await self._store.create(Subjects.PLACEMENT_KEY, value) is not None
        return await self._store.update(Subjects.PLACEMENT_KEY, value, revision) is not None

    def _remember(self, placement: Placement | None) -> None:
        if placement is not None:
            self.current = placement

    def _may_judge(self, placement: Placement | None) -> bool:
        """Whether the view of the mesh is complete enough to leave an instance out."""
        heard = {m.id for m in self._instance.members.all()}
        return time.monotonic() >= self._settled_at or not placement or heard.issuperset(placement.instances)

    def _newest(self) -> int:
        return max((_reported(member) for member in self._instance.members.all()), default=0)


def _reported(member: Member) -> int:
    """Newest placement version that an instance knows of."""
    beat = member.heartbeat
    attention = beat.attention.placement if beat.attention else 0
    experts = beat.experts.placement if beat.experts else 0
    return max(beat.placement, attention, experts)
