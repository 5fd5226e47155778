"""The loop that owns the placement: carries on the change that is under way, or begins the one that is proposed.

Leads by lease (leader.py), decides by pure functions (proposals.py, change.py), writes by compare-and-set. Not on the
token path: when it dies, serving goes on with what is committed, and another scheduler continues from the store.
"""

import asyncio
import logging
import time
from typing import Any, Literal, Self, get_args

from services.scheduler.change import NOTHING, advance, begin
from services.scheduler.leader import Leader
from services.scheduler.placement import TooFewSlots
from services.scheduler.proposals import Proposal, first, membership
from services.scheduler.rebalancer import Rebalancer
from shared.changes import Phase, PlacementRecord
from shared.config import SchedulerConfig
from shared.errors import BadMessage, BusUnavailable
from shared.lifecycle import Instance
from shared.membership import HEARTBEAT_S, Member
from shared.messages import Kind, Placement, Subjects
from shared.metrics import Sample, sample
from shared.placement.homes import BadPlacement, check_homes
from shared.placement.replacement import Floats
from shared.placement_watch import read_record
from shared.store import Store

GATHER_S = 0.2
"""Instances that become READY together make one version."""
SETTLE_S = 2.5 * HEARTBEAT_S
"""A scheduler that has just started may not have heard everybody; until then nobody is taken for gone."""
COMMIT_LIMIT_S = 15.0
"""An attention instance that has not switched by then repeats its exchanges; one that hangs is gone before."""
HOLD_S = 30.0
"""So long after a proposal of the same instances was aborted it is not tried again."""

RoundState = Literal["following", "settling", "waiting", "changing", "steady", "refused", "cut off"]
"""What a round came to: another scheduler leads; too early to judge; no expert instance; a change is under way; all is
placed; what should be placed must not or cannot be; no NATS."""

log = logging.getLogger(__name__)


class Reconciler:
    """Made by ``start``, which also sets the loop going."""

    _loop: asyncio.Task[None]

    def __init__(self, instance: Instance, config: SchedulerConfig, store: Store, leader: Leader) -> None:
        self.record: PlacementRecord | None = None
        """Newest one that was read or written here."""
        self.leader = leader
        self.state: RoundState = "following"
        self.written = 0
        """Placements that were begun here."""
        self.given_up = 0
        """Placements that were aborted here."""
        self._instance = instance
        self._config = config
        self._store = store
        self._rebalancer = Rebalancer(instance, config, self)
        self._changed = asyncio.Event()
        self._settled_at = time.monotonic() + SETTLE_S
        self._phase_since: tuple[tuple[int, Phase], float] = ((0, Phase.SETTLED), 0.0)
        self._held: tuple[tuple[str, ...], float] = ((), 0.0)
        self._problem = ""
        self._stopping = False
        self._epoch = 0  # in which this scheduler led last

    @classmethod
    async def start(cls, instance: Instance, config: SchedulerConfig) -> Self:
        """Raises BusUnavailable."""
        subjects = instance.subjects
        store = await instance.bus.store(subjects.bucket)
        leases = await instance.bus.store(subjects.leader_bucket, ttl=config.lease_s)
        leader = Leader(leases, store, f"{instance.id}/{instance.incarnation:016x}")
        reconciler = cls(instance, config, store, leader)
        instance.members.on_change(reconciler.wake)
        instance.bus.on_connection(lambda connected: reconciler.wake())
        instance.telemetry.collect(reconciler.samples)
        await reconciler._rebalancer.subscribe()
        await reconciler._round()
        reconciler._loop = instance.spawn(reconciler._run(), "reconciler")
        return reconciler

    async def stop(self) -> None:
        """End the loop and give the lease back."""
        self._stopping = True  # nats-py may drop the cancellation
        self._loop.cancel()
        await asyncio.wait([self._loop])
        try:
            await self.leader.release()
        except BusUnavailable as error:
            log.info("the lease ends by itself: %s", error)

    @property
    def leads(self) -> bool:
        return self.leader.epoch is not None

    @property
    def committed(self) -> Placement | None:
        return self.record.committed if self.record else None

    def placed(self, placement: Placement) -> list[Member]:
        """The members that a placement names, as far as they are there."""
        found = (self._instance.members.get(name) for name in placement.instances)
        return [member for member in found if member]

    def wake(self) -> None:
        """Something has changed: look again."""
        self._changed.set()

    def facts(self) -> dict[str, Any]:
        """Heartbeat fields: announces what is stored, so that the others read it, and what cannot be placed."""
        version, serial = (self.committed.version if self.committed else 0), (self.record.serial if self.record else 0)
        return {"placement": version, "serial": serial, "detail": self._problem}

    def samples(self) -> list[Sample]:
        """For /metrics; read in another thread."""
        counts: dict[tuple[str, str], int] = {}
        for member in self._instance.members.all():
            key = (member.heartbeat.kind.value, member.heartbeat.state.value)
            counts[key] = counts.get(key, 0) + 1
        instances = [sample("instances", count, kind=kind, state=state) for (kind, state), count in counts.items()]
        states = [sample("reconciler_state", self.state == state, state=state) for state in get_args(RoundState)]
        now = self.record.phase if self.record else Phase.SETTLED
        phases = [sample("placement_phase", now is phase, phase=phase.value) for phase in Phase]
        epoch = self.leader.epoch
        return [
            *instances,
            *states,
            *phases,
            sample("placement_version", self.facts()["placement"]),
            sample("placements_written", self.written),
            sample("placements_aborted", self.given_up),
            sample("leader", epoch is not None),
            sample("leader_epoch", epoch or 0),
        ]

    # ---- the loop ---------------------------------------------------------------------------------------

    async def _run(self) -> None:
        while not self._stopping:
            try:
                async with asyncio.timeout(self.leader.interval):
                    await self._changed.wait()
                if self.record is None or self.record.phase is Phase.SETTLED:
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
        stored, revision = await read_record(self._store)
        self._remember(stored)
        epoch = self.leader.epoch
        if epoch is None or (stored and stored.epoch > epoch):
            self.state = "following"
            if stored and stored.epoch > self._epoch:  # else it is only our lease that ended, under load
                self._rebalancer.ended("aborted", "another scheduler leads now")
            return
        self._epoch = epoch
        if not self._may_judge(stored):
            self.state = "settling"
            return
        self.state = "steady" if self._instance.members.ready(Kind.EXPERTS) else "waiting"
        following = await self._following(stored, epoch)
        if following and await self._write(following, revision):
            self._tell(following)
            self._remember(following)
            await self._instance.announce()
            self.wake()

    async def _following(self, stored: PlacementRecord | None, epoch: int) -> PlacementRecord | None:
        """What should be stored next; or what is, with our epoch, which makes a late write of a predecessor fail."""
        record = stored or self._recalled()
        if record.phase is Phase.SETTLED:
            following = await self._begin(record, epoch)
        else:
            self.state = "changing"
            following = advance(record, self._instance.members.all(), self._overdue(record))
        if following is None and (record is NOTHING or (stored and stored.epoch >= epoch)):
            return None
        return (following or record).model_copy(update={"epoch": epoch, "serial": record.serial + 1})

    async def _begin(self, record: PlacementRecord, epoch: int) -> PlacementRecord | None:
        """Prepare what is proposed, if anything is."""
        proposal = await self._proposed(record.committed)
        if proposal is None:
            return None
        version = max(record.newest, self._newest()) + 1
        following = begin(record, proposal.placement(version, epoch, self._instance.id))
        self._rebalancer.begun(proposal, version)
        return following

    async def _proposed(self, committed: Placement | None) -> Proposal | None:
        """What goes first of what is proposed, if it may be placed."""
        self._rebalancer.look(committed)
        try:
            proposal = first([self._of_members(committed), self._rebalancer.proposal(committed)])
            if proposal:
                check_homes(proposal.homes, proposal.moe_layers, len(proposal.instances), proposal.slots)
        except (TooFewSlots, BadPlacement) as error:
            self._rebalancer.ended("aborted", str(error))
            await self._refuse(str(error))
            return None
        await self._refuse("")
        return proposal

    def _of_members(self, committed: Placement | None) -> Proposal | None:
        def activity(layer: int) -> Floats:
            return self._rebalancer.activity(layer, experts)

        members = self._instance.members.all()
        experts = next((m.heartbeat.model.experts for m in members if m.ready and m.heartbeat.model), 0)
        config = self._config
        proposal = membership(committed, members, config.homes, config.policy, activity)
        held, until = self._held
        waits = proposal and proposal.instances == held and time.monotonic() < until
        return None if waits else proposal

    async def _write(self, record: PlacementRecord, revision: int) -> bool:
        """False when somebody else has written since it was read; the next round sees it."""
        value = record.encode()
        try:
            if revision == 0:
                return await self._store.create(Subjects.PLACEMENT_KEY, value) is not None
            return await self._store.update(Subjects.PLACEMENT_KEY, value, revision) is not None
        except BadMessage as error:
            await self._refuse(str(error))
            return False

    def _tell(self, record: PlacementRecord) -> None:
        """Log and count what was just written, and say it to who has proposed it."""
        before, other = self.record, record.other
        if record.phase is Phase.PREPARE and other and (before is None or before.phase is not Phase.PREPARE):
            self.written += 1
            log.info("placement %d: %s", other.version, other.reason)
        elif before and before.phase is Phase.PREPARE and before.other and record.phase is Phase.SETTLED:
            self.given_up += 1
            if all(m.ready for m in self.placed(before.other)):
                self._held = (before.other.instances, time.monotonic() + HOLD_S)
            self._rebalancer.aborted(before.other.version, record.verdict)
            log.warning("%s", record.verdict)
        elif before and before.phase is Phase.COMMIT and record.phase is Phase.SETTLED:
            log.info("%s", record.verdict)

    async def _refuse(self, problem: str) -> None:
        """What should be placed cannot be; said once."""
        if problem:
            self.state = "refused"
        if problem == self._problem:
            return
        self._problem = problem
        if problem:
            log.error("%s", problem)
        await self._instance.announce()

    # ---- what is known ----------------------------------------------------------------------------------

    def _recalled(self) -> PlacementRecord:
        """When the store was lost: what was there, if nobody has seen anything newer."""
        return self.record if self.record and self.record.newest >= self._reported() else NOTHING

    def _remember(self, record: PlacementRecord | None) -> None:
        if record is not None:
            self.record = record
            key = (record.newest, record.phase)
            if key != self._phase_since[0]:
                self._phase_since = key, time.monotonic()

    def _overdue(self, record: PlacementRecord) -> bool:
        limit = self._config.prepare_deadline if record.phase is Phase.PREPARE else COMMIT_LIMIT_S
        return time.monotonic() - self._phase_since[1] > limit

    def _may_judge(self, record: PlacementRecord | None) -> bool:
        """Whether the view of the mesh is complete enough to leave an instance out, or to take it for gone."""
        if time.monotonic() >= self._settled_at or record is None:
            return True
        heard = {m.id for m in self._instance.members.all()}
        switching = record.phase is Phase.COMMIT and record.other is not None
        return not switching and all(heard.issuperset(p.instances) for p in record.versions)

    def _newest(self) -> int:
        """The next version must exceed it even if the store was lost."""
        return max(self.record.newest if self.record else 0, self._reported())

    def _reported(self) -> int:
        """The highest version that anybody reports."""
        return max((_reported(member) for member in self._instance.members.all()), default=0)


def _reported(member: Member) -> int:
    """Newest placement version that an instance knows of."""
    beat = member.heartbeat
    attention = beat.attention.placement if beat.attention else 0
    experts = beat.experts.placement if beat.experts else 0
    return max(beat.placement, attention, experts)
