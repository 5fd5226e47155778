"""Rebalancing, asked for by a person over NATS or due by itself: both become goals, and proposals on the way there.

Writes nothing: the reconciler takes proposals from here and says how they end. A goal is lost with its scheduler, which
leaves the placement at one of the steps on the way, each of which serves.
"""

import asyncio
import logging
import secrets
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np

from services.scheduler.placement import TooFewSlots, budget, homes_per_expert, room
from services.scheduler.proposals import Priority, Proposal, stage
from services.scheduler.rebalance import Costs, Move, applied, better, given
from services.scheduler.scaler import Scaler
from services.scheduler.scaling import elastic
from services.scheduler.window import Seen, Window
from shared.changes import Outcome, Phase, PlacementRecord, Rebalance, RebalancePlan, Ticket
from shared.config import SchedulerConfig
from shared.errors import BadMessage, Refused
from shared.lifecycle import Instance
from shared.load_messages import Activated
from shared.membership import Member
from shared.messages import ModelFacts, Placement
from shared.placement.homes import BadPlacement, Masks
from shared.placement.replacement import Floats
from shared.placement_watch import homes_array

MOST_OUTCOMES = 64

Given = Mapping[int, Mapping[str, Sequence[int]]]
"""Layer -> instance -> experts."""

log = logging.getLogger(__name__)


class Standing(Protocol):
    """What is asked of the reconciler."""

    @property
    def leads(self) -> bool: ...

    @property
    def record(self) -> PlacementRecord | None: ...

    def placed(self, placement: Placement) -> list[Member]:
        """The members that a placement names, as far as they are there."""
        ...

    def wake(self) -> None:
        """There is something new to propose."""
        ...


@dataclass
class Goal:
    """Where a rebalance leads."""

    ticket: str
    priority: Priority
    reason: str
    digest: str
    instances: tuple[str, ...]
    homes: Masks
    """uint64 [MoE layers, experts]"""
    version: int = 0
    """Of the step that is being carried out."""


class Rebalancer:
    """Make it, then ``subscribe``. Belongs to the asyncio thread."""

    def __init__(self, instance: Instance, config: SchedulerConfig, standing: Standing) -> None:
        self._instance = instance
        self._homes = config.homes
        self._every = {Priority.REBALANCE: config.rebalance_s, Priority.SCALING: config.expert_scaling_s}
        self._due = {kind: time.monotonic() + every for kind, every in self._every.items()}
        self._standing = standing
        self._window = Window()
        self._scaler = Scaler(instance, config, self._window)
        self._goal: Goal | None = None
        self._outcomes: dict[str, Outcome] = {}
        self._looking: asyncio.Task[None] | None = None

    async def subscribe(self) -> None:
        """Listen to attention instances and to people. Raises BusUnavailable."""
        bus, subjects = self._instance.bus, self._instance.subjects
        await bus.subscribe(subjects.activated, Activated, self._activated, ordered=True)
        await self._scaler.subscribe()
        await bus.subscribe(subjects.scheduler("rebalance"), Rebalance, self._by_hand)
        await bus.subscribe(subjects.scheduler("outcome"), Ticket, self._outcome)

    def activity(self, layer: int, experts: int) -> Floats:
        """[E]: share of the exchanges of a layer in which an expert is activated; all alike while nothing is known."""
        seen = self._window.seen(layer, experts, time.monotonic())
        return seen.activity if seen else np.ones(experts)

    # ---- what the reconciler asks and says --------------------------------------------------------------

    def proposal(self, committed: Placement | None) -> Proposal | None:
        """The next step to the goal; ends it when it is reached, or cannot be any more."""
        goal = self._goal
        if goal is None or committed is None:
            return None
        if (committed.digest, committed.instances) != (goal.digest, goal.instances):
            self.ended("aborted", f"the expert instances changed meanwhile: {committed.reason}")
            return None
        now = homes_array(committed)
        if (now == goal.homes).all():
            self.ended("committed", f"placement {committed.version} ({committed.reason}) is in use")
            return None
        members = self._standing.placed(committed)
        try:
            slots = room(members, self._model(committed, members))
        except Refused:
            return None  # somebody is leaving: there will be another proposal
        step = stage(now, goal.homes, len(goal.instances), slots)
        return Proposal(
            goal.priority, goal.reason, goal.digest, goal.instances, committed.moe_layers, step, committed.policy, slots
        )

    def begun(self, proposal: Proposal, version: int) -> None:
        """A proposal is being prepared."""
        if self._goal and proposal.priority is self._goal.priority:
            self._goal.version = version

    def aborted(self, version: int, verdict: str) -> None:
        """A version was given up; the goal with it if it was a step there."""
        if self._goal and self._goal.version == version:
            self.ended("aborted", verdict)

    def ended(self, state: Literal["committed", "aborted"], text: str) -> None:
        """The goal is reached or given up."""
        if self._goal:
            self._outcomes[self._goal.ticket] = Outcome(state=state, text=text)
            self._goal = None
            for ticket in list(self._outcomes)[:-MOST_OUTCOMES]:
                del self._outcomes[ticket]

    def look(self, committed: Placement | None) -> None:
        """When it is due: see in the background whether other homes pay, and make them the goal.

        Those of elastic experts follow the loads that are foreseen, others what was activated.
        """
        looking = self._looking and not self._looking.done()
        if committed is None or self._goal or looking:
            return
        members, now = self._standing.placed(committed), time.monotonic()
        kind = Priority.SCALING if elastic(members) else Priority.REBALANCE
        if self._every[kind] and now >= self._due[kind]:
            self._due[kind] = now + self._every[kind]
            self._looking = self._instance.spawn(self._look(committed, members, kind), "rebalance")

    async def _look(self, committed: Placement, members: Sequence[Member], kind: Priority) -> None:
        try:
            if kind is Priority.SCALING:
                moves, what = await self._scaler.moves(committed, members), "experts follow their load"
            else:
                costs, what = Costs.of(members), "rebalance"
                moves = [move for move in await self._better(committed, members) if move.pays(costs)]
            if moves:
                self._free(committed.version)
                self._aim(committed, moves, kind, what)
        except Refused as refusal:
            log.debug("no rebalance now: %s", refusal)

    # ---- messages ---------------------------------------------------------------------------------------

    def _activated(self, message: Activated) -> None:
        try:
            self._window.add(message, time.monotonic())
        except BadMessage as error:
            self._instance.bus.counts["malformed"] += 1
            log.debug("%s", error)

    async def _outcome(self, message: Ticket) -> Outcome | None:
        if not self._standing.leads:
            return None
        if self._goal and self._goal.ticket == message.ticket:
            return Outcome(state="open")
        return self._outcomes.get(message.ticket, Outcome(state="unknown"))

    async def _by_hand(self, request: Rebalance) -> RebalancePlan | None:
        """Raises Refused."""
        if not self._standing.leads:
            return None  # the scheduler that leads answers
        committed = self._committed() if request.dry_run else self._free()
        members = self._standing.placed(committed)
        wanted = request.given
        moves = self._given(committed, members, wanted) if wanted else await self._better(committed, members)
        if not moves:
            problem = "that is the placement in use" if wanted else "nothing to gain: activated experts are spread well"
            raise Refused("not_now", problem)
        ticket = ""
        if not request.dry_run:
            self._free(committed.version)
            ticket = self._aim(committed, moves, Priority.HAND, "rebalance by hand")
        costs = Costs.of(members)
        return RebalancePlan(layers=tuple(m.plan(committed.moe_layers, costs) for m in moves), ticket=ticket)

    def _committed(self) -> Placement:
        """Raises Refused when nothing is placed."""
        record = self._standing.record
        if record is None or record.committed is None:
            raise Refused("not_now", "nothing is placed yet: no expert instance is ready")
        return record.committed

    def _free(self, version: int = 0) -> Placement:
        """The committed placement, which must be ``version`` if given. Raises Refused while a change is under way."""
        committed, record = self._committed(), self._standing.record
        busy = record is None or record.phase is not Phase.SETTLED or self._goal
        if busy or version not in (0, committed.version):
            what = f": {record.other.reason}" if record and record.other else ""
            raise Refused("not_now", f"a change of the placement is under way{what}; try again when it has ended")
        return committed

    def _given(self, committed: Placement, members: Sequence[Member], wanted: Given) -> list[Move]:
        """Raises Refused."""
        seen = self._seen(committed)
        try:
            return given(committed, wanted, seen.get, room(members, self._model(committed, members)))
        except (BadPlacement, ValueError) as error:
            raise Refused("invalid", str(error)) from error

    async def _better(self, committed: Placement, members: Sequence[Member]) -> list[Move]:
        """Raises Refused."""
        model, seen = self._model(committed, members), self._seen(committed)
        homes = homes_per_expert(self._homes, members)
        try:
            slots = budget(members, model, homes)
        except TooFewSlots as error:
            raise Refused("not_now", str(error)) from error
        if slots >= committed.experts:
            raise Refused("not_now", "every expert may have a home on every instance: there is nothing to move")
        if not seen:
            raise Refused("not_now", "no activity was reported yet: send requests first")
        return await asyncio.to_thread(better, committed, seen.get, slots)

    def _model(self, committed: Placement, members: Sequence[Member]) -> ModelFacts:
        """The model that is placed. Raises Refused when an instance of the placement is not there."""
        models = [m.heartbeat.model for m in members if m.ready and m.heartbeat.model]
        if len(models) < len(committed.instances):
            raise Refused("not_now", "not all expert instances of the placement are ready; try again in a moment")
        return models[0]

    # ---- goals ------------------------------------------------------------------------------------------

    def _aim(self, committed: Placement, moves: Sequence[Move], priority: Priority, what: str) -> str:
        """Make it the goal; returns its ticket."""
        moved = sum(move.moved for move in moves)
        reason = f"{what}: {moved} replicas in {len(moves)} layers"
        homes = applied(committed, moves)
        self._goal = Goal(secrets.token_hex(8), priority, reason, committed.digest, committed.instances, homes)
        self._standing.wake()
        return self._goal.ticket

    def _seen(self, placement: Placement) -> dict[int, Seen]:
        now = time.monotonic()
        found = {layer: self._window.seen(layer, placement.experts, now) for layer in placement.moe_layers}
        return {layer: seen for layer, seen in found.items() if seen}
