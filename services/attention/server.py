"""The NATS side of an attention instance: requests come in, tokens go out, the view of the mesh reaches the engine.

Runs in the asyncio thread. Decides nothing about requests: the engine does.
"""

import asyncio
import time
from collections.abc import Callable

from opentelemetry.trace import Span

from services.attention.desk import ACCEPTED
from services.attention.engine import Engine
from services.attention.exchange import ExpertInstance, Neighbour, View
from services.attention.outbox import pack
from services.attention.parts import PartBuffer
from shared.lifecycle import Instance
from shared.membership import Member, Members
from shared.messages import Kind, Placement, State
from shared.placement_watch import PlacementWatch
from shared.request_messages import Ack, Cancel, Decision, Resend, Submit, TokenDelta, Tokens
from shared.telemetry import extract

REFRESH_S = 1.0
"""How often the exchange learns whose heartbeats still come: they end its suspicions."""
DRAIN_POLL_S = 0.02
SWITCH_LIMIT_S = 10.0
"""Of waiting for a switch to another placement, which comes with the next step; then heartbeats will tell."""


def build_view(placement: Placement | None, members: Members, digest: str, node: str = "") -> View:
    """What an attention instance on ``node`` sees of the expert instances of our model.

    Those that answer exchanges: READY ones, and DRAINING ones until they are gone.
    """
    everybody = members.all()
    experts = {m.id: _expert(m, node) for m in everybody if m.heartbeat.kind is Kind.EXPERTS and _answers(m, digest)}
    neighbours = {m.id: neighbour for m in everybody if (neighbour := _neighbour(m, digest, node))}
    return View(placement, experts, neighbours, node)


def _neighbour(member: Member, digest: str, node: str) -> Neighbour | None:
    """An attention instance that may run steps together with one on ``node``."""
    heartbeat = member.heartbeat
    facts, model = heartbeat.attention, heartbeat.model
    if facts is None or not facts.address or model is None or member.suspect:
        return None
    here = heartbeat.node == node and model.digest == digest and heartbeat.state in (State.READY, State.DRAINING)
    return Neighbour(heartbeat.incarnation, facts.address) if here else None


def _answers(member: Member, digest: str) -> bool:
    heartbeat = member.heartbeat
    same_model = heartbeat.model is not None and heartbeat.model.digest == digest
    return same_model and heartbeat.experts is not None and heartbeat.state in (State.READY, State.DRAINING)


def _expert(member: Member, node: str) -> ExpertInstance:
    heartbeat = member.heartbeat
    assert heartbeat.experts is not None
    cores = frozenset(heartbeat.experts.cores if heartbeat.node == node else ())
    address = heartbeat.experts.address
    return ExpertInstance(member.id, heartbeat.incarnation, address, member.last_seen, cores, heartbeat.node)


class AttentionServer:
    """Make it, give ``emit`` to the engine, then ``start`` it."""

    def __init__(self, instance: Instance, digest: str) -> None:
        self._instance = instance
        self._telemetry = instance.telemetry
        self._digest = digest
        self._loop = asyncio.get_running_loop()
        self._outgoing: asyncio.Queue[tuple[str, list[TokenDelta]]] = asyncio.Queue()
        self._adopted: Placement | None = None
        self._gateways: dict[str, int] = {}
        self._spans: dict[str, Span] = {}

    def emit(self, gateway: str, deltas: list[TokenDelta]) -> None:
        """From the compute thread: send these as soon as possible."""
        self._loop.call_soon_threadsafe(self._outgoing.put_nowait, (gateway, deltas))

    async def start(
        self,
        engine: Engine,
        watch: PlacementWatch,
        max_model_len: int,
        foresee: Callable[[View], None] = lambda view: None,
    ) -> None:
        """Subscribe, and keep the engine's view current from now on; ``foresee`` gets it at once, not between steps."""
        self._engine, self._watch, self._foresee = engine, watch, foresee
        self._parts = PartBuffer(4 * max_model_len)
        instance = self._instance
        instance.members.on_change(self._refresh)
        watch.on_change(self._refresh)
        instance.spawn(self._keep_refreshing(), "view")
        instance.spawn(self._keep_publishing(), "tokens")
        await self._subscribe("submit", Submit, self._submit)
        await self._subscribe("cancel", Cancel, self._cancel)
        await self._subscribe("resend", Resend, lambda m: engine.resend(m.request_id, m.position))
        await self._subscribe("ack", Ack, engine.acknowledge)

    async def drain(self, seconds: float) -> None:
        """Take nothing new; let open requests finish for so long, then hand them back to their gateways."""
        self._engine.desk.draining = True
        if not await self._idle(seconds):
            self._engine.fail_all("draining", "this instance is stopping")
            await self._idle(1.0)
        await self._until(self._outgoing.empty, 1.0)

    async def _idle(self, seconds: float) -> bool:
        return await self._until(lambda: self._engine.open == 0, seconds)

    async def _until(self, condition: Callable[[], bool], seconds: float) -> bool:
        give_up = self._loop.time() + seconds
        while not condition():
            if self._loop.time() >= give_up:
                return False
            await asyncio.sleep(DRAIN_POLL_S)
        return True

    async def _subscribe(self, verb: str, kind: type, handler: Callable) -> None:
        subject = self._instance.subjects.attention(self._instance.id, verb)  # type: ignore[arg-type]
        await self._instance.bus.subscribe(subject, kind, handler)

    # ---- in ---------------------------------------------------------------------------------------------

    def _submit(self, message: Submit) -> Decision:
        if self._engine.desk.knows(message.request_id):
            return ACCEPTED
        request = self._parts.add(message, time.monotonic())
        if isinstance(request, Decision):
            return request
        return self._submit_traced(request) if self._telemetry.tracing else self._engine.submit(request)

    def _submit_traced(self, request: Submit) -> Decision:
        tokens = len(request.prompt) // 4
        span = self._telemetry.start(
            "attention.request", extract(request.trace), request_id=request.request_id, prompt_tokens=tokens
        )
        self._spans[request.request_id] = span
        decision = self._engine.submit(request, self._telemetry.frame(span, first=True))
        if not decision.ok:
            self._end_span(request.request_id, decision.code or "")
        return decision

    def _cancel(self, message: Cancel) -> Decision:
        self._parts.drop(message.request_id)
        self._engine.cancel(message.request_id)
        return Decision(ok=True)

    # ---- out --------------------------------------------------------------------------------------------

    async def _keep_publishing(self) -> None:
        instance = self._instance
        while True:
            gateway, deltas = await self._outgoing.get()
            for group in pack(deltas):
                await instance.bus.publish(
                    instance.subjects.tokens(gateway), Tokens(attention=instance.id, deltas=group)
                )
            for delta in deltas if self._spans else ():
                if delta.finish:
                    self._end_span(delta.request_id, delta.finish)

    def _end_span(self, request_id: str, outcome: str) -> None:
        span = self._spans.pop(request_id, None)
        if span is not None:
            span.set_attribute("outcome", outcome)
            span.end()

    # ---- the mesh ---------------------------------------------------------------------------------------

    async def _keep_refreshing(self) -> None:
        while True:
            self._refresh()
            await asyncio.sleep(REFRESH_S)

    def _refresh(self) -> None:
        """Give the engine the newest view, with the committed placement: all of its instances have loaded it."""
        newest, members = self._watch.current, self._instance.members
        if newest and newest.digest == self._digest and newest is not self._adopted:
            self._adopted = newest
            self._instance.spawn(self._report(newest.version), "switch")
        view = build_view(self._adopted, members, self._digest, self._instance.node)
        self._foresee(view)
        self._engine.update(view)
        self._check_leases()

    async def _report(self, version: int) -> None:
        """Say at once when the engine has switched: the old homes wait for that."""
        if await self._until(lambda: self._engine.stats.placement >= version, SWITCH_LIMIT_S):
            await self._instance.announce()

    def _check_leases(self) -> None:
        """A gateway that is gone, or has started anew, reads nothing of what it asked for before."""
        now = {m.id: m.heartbeat.incarnation for m in self._instance.members.all() if m.heartbeat.kind is Kind.GATEWAY}
        for gateway, incarnation in self._gateways.items():
            if now.get(gateway) != incarnation:
                self._engine.drop_gateway(gateway)
        self._gateways = now
