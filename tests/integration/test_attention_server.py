"""The NATS side around a toy engine, in this process: draining, spans, and which experts the engine gets to see."""

import threading
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from itertools import pairwise

from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from services.attention.server import AttentionServer, build_view
from shared.bus import Bus
from shared.config import MeshConfig
from shared.lifecycle import Instance
from shared.membership import Members
from shared.messages import ExpertFacts, Heartbeat, Kind, ModelFacts, State
from shared.nats_server import NatsServer
from shared.placement_watch import PlacementWatch
from shared.request_messages import Decision, SamplingParams, Submit, TokenDelta
from shared.request_messages import Tokens as TokensMessage
from shared.telemetry import Telemetry
from tests.integration.waiting import until
from tests.unit.toy_engine import ToyEngine, alone, int32

PROMPT = [3, 1, 4, 1, 5]
MODEL = ModelFacts(name="m", digest="aa", layers=1, moe_layers=(0,), experts=4, top_k=2)
TRACE = {"traceparent": "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"}


@dataclass
class Serving:
    """A server with its engine running, and one gateway's view of it."""

    server: AttentionServer
    toy: ToyEngine
    bus: Bus
    subject: str
    spans: InMemorySpanExporter
    telemetry: Telemetry
    deltas: list[TokenDelta] = field(default_factory=list)

    async def submit(self, request_id: str, max_tokens: int) -> Decision:
        sampling = SamplingParams(max_tokens=max_tokens, temperature=0)
        request = Submit(
            request_id=request_id, gateway="g", prompt=int32(PROMPT), sampling=sampling, deadline_s=1e9, trace=TRACE
        )
        return await self.bus.request(self.subject, request, Decision, 10.0)

    def finish(self) -> str | None:
        return next((d.finish for d in self.deltas if d.finish), None)

    def tokens(self) -> list[int]:
        return [token for delta in self.deltas for token in delta.tokens]


@asynccontextmanager
async def serving(nats: NatsServer, bus: Bus, mesh: str, max_model_len: int = 1000) -> AsyncIterator[Serving]:
    exporter = InMemorySpanExporter()
    async with Instance(Kind.ATTENTION, MeshConfig(mesh=mesh, nats=nats.url, id="a"), signals=False) as instance:
        instance.telemetry = Telemetry("attention", "a", mesh, exporter=exporter)
        server = AttentionServer(instance, MODEL.digest)
        toy = ToyEngine(emit=server.emit, record=instance.telemetry.record, max_model_len=max_model_len, kv_blocks=500)
        woken = threading.Event()
        toy.exchange.idle_wait = lambda timeout: woken.wait(0.005)
        await server.start(toy.engine, await PlacementWatch(instance).start(), max_model_len)
        subject = instance.subjects.attention("a", "submit")
        made = Serving(server, toy, bus, subject, exporter, instance.telemetry)

        def receive(message: TokensMessage) -> None:
            made.deltas.extend(message.deltas)

        await bus.subscribe(instance.subjects.tokens("g"), TokensMessage, receive, ordered=True)
        thread = threading.Thread(target=toy.engine.run)
        thread.start()
        try:
            yield made
        finally:
            toy.engine.stop()
            thread.join(10)


async def test_draining_lets_open_requests_finish(nats_server: NatsServer, bus: Bus, mesh: str) -> None:
    async with serving(nats_server, bus, mesh) as s:
        assert (await s.submit("r", 40)).ok
        await s.server.drain(30.0)
        await until(s.finish, "the end")
        assert (s.finish(), s.tokens()) == ("length", alone(PROMPT, max_tokens=40).tokens)
        assert (await s.submit("late", 4)).code == "draining"


async def test_draining_hands_back_what_does_not_finish_in_time(nats_server: NatsServer, bus: Bus, mesh: str) -> None:
    async with serving(nats_server, bus, mesh) as s:
        s.toy.exchange.available = False
        assert (await s.submit("r", 40)).ok
        await s.server.drain(0.1)
        await until(s.finish, "the end")
        error = s.deltas[-1].error
        assert error is not None
        assert (s.finish(), error.code) == ("error", "draining")
        assert s.toy.pool.leaked() == []


async def test_a_traced_request_becomes_a_span_under_its_parent(nats_server: NatsServer, bus: Bus, mesh: str) -> None:
    async with serving(nats_server, bus, mesh) as s:
        assert (await s.submit("r", 4)).ok
        assert (await s.submit("r", 4)).ok
        assert (await s.submit("refused", 5000)).code == "too_long"
        await until(s.finish, "the end")
        await until(lambda: not s.server._spans, "the span ends")
        s.telemetry.shutdown()
        finished = s.spans.get_finished_spans()
        requests = [span for span in finished if span.name == "attention.request"]
        spans = {span.attributes["request_id"]: span for span in requests if span.attributes}
        assert {name: (span.attributes or {})["outcome"] for name, span in spans.items()} == {
            "r": "length",
            "refused": "too_long",
        }
        parent = spans["r"].parent
        assert parent is not None
        assert f"{parent.span_id:016x}" in TRACE["traceparent"]
        own = spans["r"].get_span_context()
        assert own is not None
        phases = [span for span in finished if span.parent and span.parent.span_id == own.span_id]
        assert [p.name for p in phases] == ["attention.queue", "attention.prefill", "attention.decode"]
        assert all(a.end_time == b.start_time for a, b in pairwise(phases))


# ---- the view -----------------------------------------------------------------------------------------------


def test_the_engine_sees_ready_and_draining_experts_of_its_own_model_only() -> None:
    members = Members("m")

    def join(id: str, state: State, digest: str = MODEL.digest, kind: Kind = Kind.EXPERTS) -> None:
        model = MODEL.model_copy(update={"digest": digest})
        facts = ExpertFacts(address=id.encode()) if kind is Kind.EXPERTS else None
        members.beat(Heartbeat(kind=kind, id=id, incarnation=1, state=state, node="n", model=model, experts=facts))

    join("ready", State.READY)
    join("leaving", State.DRAINING)
    join("loading", State.STARTING)
    join("stranger", State.READY, digest="bb")
    join("gateway", State.READY, kind=Kind.GATEWAY)
    assert set(build_view(None, members, MODEL.digest).instances) == {"ready", "leaving"}
