"""A real attention instance over real NATS, spoken to as a gateway does, with real experts behind it."""

import asyncio
import os
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import httpx
import numpy as np
import pytest

from shared.bus import Bus
from shared.membership import Members
from shared.messages import AttentionFacts, Heartbeat, Kind, State, Subjects
from shared.request_messages import Ack, Cancel, Decision, Resend, SamplingParams, Submit, TokenDelta, Tokens
from tests.integration.waiting import until
from tests.mesh import RunningMesh, running_mesh

MESH = "attention"
ATTENTION = "attention-0"
PROMPT = list(range(5, 25))


@pytest.fixture(scope="module")
def mesh() -> Iterator[RunningMesh]:
    with running_mesh(attention=1, experts=1, mesh=MESH, settings={"no_home_deadline": "200"}) as running:
        yield running


@dataclass
class Client:
    """What a gateway does on NATS, without the gateway."""

    bus: Bus
    id: str
    members: Members
    deltas: list[TokenDelta] = field(default_factory=list)
    subjects: Subjects = field(default_factory=lambda: Subjects(MESH))

    async def ask(self, verb: Any, message: Any) -> Decision:
        return await self.bus.request(self.subjects.attention(ATTENTION, verb), message, Decision, 30.0)

    async def submit(self, request_id: str, prompt: list[int] = PROMPT, **changes: Any) -> Decision:
        return await self.ask("submit", self.request(request_id, prompt, **changes))

    def request(self, request_id: str, prompt: list[int], output: tuple[int, ...] = (), **sampling: Any) -> Submit:
        return Submit(
            request_id=request_id, gateway=self.id, prompt=packed(prompt), output=packed(output), deadline_s=120.0,
            sampling=SamplingParams(**{"max_tokens": 16, "temperature": 0, **sampling}),
        )  # fmt: skip

    def tokens(self, request_id: str) -> list[int]:
        """Joined by position, whatever came twice."""
        joined: list[int] = []
        for delta in self.deltas:
            if delta.request_id == request_id and delta.position <= len(joined):
                joined += delta.tokens[len(joined) - delta.position :]
        return joined

    def finish(self, request_id: str) -> str | None:
        return next((d.finish for d in self.deltas if d.request_id == request_id and d.finish), None)

    async def output(self, request_id: str) -> list[int]:
        await until(lambda: self.finish(request_id), f"{request_id} finishes")
        return self.tokens(request_id)

    async def run(self, request_id: str, **changes: Any) -> list[int]:
        assert (await self.submit(request_id, **changes)).ok
        return await self.output(request_id)

    def facts(self) -> AttentionFacts:
        member = self.members.get(ATTENTION)
        assert member is not None
        assert member.heartbeat.attention is not None
        return member.heartbeat.attention

    async def until_idle(self) -> None:
        """Heartbeats say that nothing runs or waits and that every block is free."""
        await until(lambda: self._idle(self.facts()), "the instance is idle")

    def _idle(self, facts: AttentionFacts) -> bool:
        return (facts.running, facts.waiting, facts.outstanding_tokens, facts.kv_blocks_used) == (0, 0, 0, 0)


@asynccontextmanager
async def connected(mesh: RunningMesh, id: str) -> AsyncIterator[Client]:
    bus = await Bus.connect(mesh.mesh.nats_url, id)
    client = Client(bus, id, Members(MESH))
    await client.members.watch(bus)

    def receive(message: Tokens) -> None:
        client.deltas.extend(message.deltas)

    await bus.subscribe(client.subjects.tokens(id), Tokens, receive, ordered=True)
    await until(lambda: (m := client.members.get(ATTENTION)) and m.ready, "attention is ready")
    try:
        yield client
    finally:
        await bus.close()


@pytest.fixture
async def client(mesh: RunningMesh) -> AsyncIterator[Client]:
    async with connected(mesh, f"gateway-{os.urandom(4).hex()}") as made:
        yield made


def packed(tokens: Any) -> bytes:
    return np.array(tokens, dtype="<i4").tobytes()


async def test_tokens_come_with_positions_and_can_be_had_again_until_acknowledged(client: Client) -> None:
    tokens = await client.run("a")
    assert len(tokens) == 16
    assert [d.position for d in client.deltas] == list(range(16)), "one delta for each step"
    client.deltas.clear()
    assert (await client.ask("resend", Resend(request_id="a", position=10))).ok
    await until(lambda: client.deltas, "the resend")
    assert (client.deltas[0].position, list(client.deltas[0].tokens)) == (10, tokens[10:])
    await client.bus.publish(client.subjects.attention(ATTENTION, "ack"), Ack(gateway=client.id, done=("a",)))
    gone = Resend(request_id="a", position=0)
    while (decision := await client.ask("resend", gone)).ok:
        pass
    assert decision.code == "unknown"


async def test_concurrent_requests_get_what_each_gets_alone(client: Client) -> None:
    ways = [{"temperature": 1.0, "seed": n, "logprobs": 1, "prompt": PROMPT[: n + 1]} for n in range(12)]
    alone = [await client.run(f"alone-{n}", **way) for n, way in enumerate(ways)]
    for n, way in enumerate(ways):
        assert (await client.submit(f"together-{n}", **way)).ok
    assert [await client.output(f"together-{n}") for n in range(len(ways))] == alone


async def test_a_resumed_request_goes_on_as_if_nothing_had_happened(client: Client) -> None:
    whole = await client.run("whole", temperature=1.0, seed=7, presence_penalty=0.5)
    assert (await client.submit("rest", output=tuple(whole[:9]), temperature=1.0, seed=7, presence_penalty=0.5)).ok
    await until(lambda: client.finish("rest"))
    rest = [token for d in client.deltas if d.request_id == "rest" for token in d.tokens]
    assert rest == whole[9:]
    assert min(d.position for d in client.deltas if d.request_id == "rest") == 9


async def test_a_prompt_in_parts_is_the_same_request(client: Client) -> None:
    whole = await client.run("whole-prompt")
    request = client.request("parts", PROMPT)
    for part, tokens in enumerate((PROMPT[:7], PROMPT[7:8], PROMPT[8:])):
        message = request.model_copy(update={"prompt": packed(tokens), "part": part, "parts": 3})
        assert (await client.ask("submit", message)).ok
    assert await client.output("parts") == whole


async def test_a_repeated_submit_is_accepted_and_runs_once(client: Client) -> None:
    decisions = await asyncio.gather(*(client.submit("twice") for _ in range(5)))
    assert all(decision.ok for decision in decisions)
    await client.output("twice")
    assert len(client.deltas) == 16


async def test_cancelling_frees_the_blocks(client: Client) -> None:
    await client.submit("long", max_tokens=1500)
    await until(lambda: len(client.tokens("long")) > 3)
    assert (await client.ask("cancel", Cancel(request_id="long"))).ok
    await client.until_idle()
    assert len(client.tokens("long")) < 1500
    assert (await client.ask("cancel", Cancel(request_id="never heard of"))).ok


async def test_the_requests_of_a_gateway_that_leaves_are_dropped(mesh: RunningMesh, client: Client) -> None:
    beat = Heartbeat(kind=Kind.GATEWAY, id=client.id, incarnation=5, state=State.READY, node="n")
    subject = client.subjects.heartbeat(Kind.GATEWAY, client.id)
    await client.bus.publish(subject, beat)
    await client.submit("orphan", max_tokens=1500)
    await until(lambda: len(client.tokens("orphan")) > 3)
    await client.bus.publish(subject, beat.model_copy(update={"state": State.GONE}))
    await client.until_idle()


async def test_bad_requests_are_refused_with_the_reason(client: Client) -> None:
    longest = client.facts().max_model_len
    assert (await client.submit("b1", max_tokens=longest)).code == "too_long"
    assert (await client.submit("b2", prompt=[10**6])).code == "invalid"
    assert (await client.submit("b3", prompt=[])).code == "invalid"
    assert (await client.ask("resend", Resend(request_id="b1", position=0))).code == "unknown"
    subject = client.subjects.attention(ATTENTION, "submit")
    odd = await client.bus.request(subject, Cancel(request_id="not a submit"), Decision, 30.0)
    assert (odd.ok, odd.code) == (False, "invalid")


async def test_metrics_show_what_was_done(client: Client) -> None:
    await client.run("counted")
    member = client.members.get(ATTENTION)
    assert member is not None
    async with httpx.AsyncClient() as http:
        text = (await http.get(member.heartbeat.url + "/metrics")).text
    for name in ("steps_total", "generated_tokens_total", "exchange_bytes_total", "step_seconds_count", "kv_blocks "):
        assert f"moemesh_{name}" in text


async def test_a_restart_of_nats_loses_no_token(mesh: RunningMesh, client: Client) -> None:
    expected = await client.run("quiet", max_tokens=120)
    await client.submit("shaken", max_tokens=120)
    await until(lambda: len(client.tokens("shaken")) > 3)
    assert mesh.mesh.nats is not None
    await asyncio.to_thread(mesh.call, mesh.mesh.nats.kill())
    await asyncio.to_thread(mesh.call, mesh.mesh.nats.start())
    await client.bus.until_connected("nats", 30.0)
    while len(client.tokens("shaken")) < 120:
        subject = client.subjects.attention(ATTENTION, "resend")
        await ask_again(client, subject, Resend(request_id="shaken", position=len(client.tokens("shaken"))))
    assert client.tokens("shaken") == expected


async def ask_again(client: Client, subject: str, message: Resend) -> None:
    """As a gateway after a second of silence; just after a restart nobody may listen yet."""
    from shared.errors import BusUnavailable

    try:
        assert (await client.bus.request(subject, message, Decision, 5.0)).ok
    except BusUnavailable:
        return
    have = len(client.tokens("shaken"))
    await until(lambda: len(client.tokens("shaken")) > have or client.finish("shaken"), "more tokens")


async def test_requests_wait_while_the_only_expert_instance_restarts(mesh: RunningMesh, client: Client) -> None:
    expected = await client.run("before", max_tokens=200)
    await client.submit("during", max_tokens=200)
    await until(lambda: len(client.tokens("during")) > 3)
    mesh.kill("experts-0")
    assert client.finish("during") is None, "killed too late to show anything"
    await until(lambda: client.finish("during"), "the request goes on", 120.0)
    assert client.tokens("during") == expected
    assert client.finish("during") == "length"


# ---- the process --------------------------------------------------------------------------------------------


async def serve(nats_url: str, mesh: str, *flags: str) -> asyncio.subprocess.Process:
    return await asyncio.create_subprocess_exec(
        sys.executable, "-m", "shared.cli.main", "serve", "attention", "--nats", nats_url, "--mesh", mesh, *flags,
        stderr=subprocess.PIPE,
    )  # fmt: skip


async def test_settings_that_cannot_work_end_the_process_with_one_line(bus: Bus, mesh_name: str) -> None:
    """Started at the same time: it is their start that takes long."""
    last_words = {
        ("--kv-memory", "1MiB"): "--kv-memory: 1MiB holds",
        ("--max-model-len", "100000"): "--max-model-len: 100000: this model allows 1 to 2048",
        ("--dtype", "int3"): "--dtype: 'int3' is not one of",
        ("--model", "/nowhere"): "/nowhere",
    }
    started = [await serve(bus.url, mesh_name, *flags) for flags in last_words]
    ended = await asyncio.gather(*(asyncio.wait_for(process.communicate(), 120) for process in started))
    assert [process.returncode for process in started] == [1] * len(started)
    for words, (_, errors) in zip(last_words.values(), ended, strict=True):
        assert words in errors.decode().strip().splitlines()[-1]
        assert "Traceback" not in errors.decode()


@pytest.fixture
def mesh_name() -> str:
    return f"test-{os.urandom(4).hex()}"


async def test_an_instance_without_experts_refuses_and_stops_cleanly(bus: Bus, mesh_name: str) -> None:
    members = Members(mesh_name)
    await members.watch(bus)
    process = await serve(bus.url, mesh_name, "--id", ATTENTION)
    await until(lambda: ((m := members.get(ATTENTION)) and m.ready) or process.returncode, "ready", 240.0)
    request = Client(bus, "g", members).request("r", PROMPT)
    decision = await bus.request(Subjects(mesh_name).attention(ATTENTION, "submit"), request, Decision, 10.0)
    assert decision.code == "no_experts"
    process.terminate()
    await asyncio.wait_for(process.communicate(), 60)
    assert process.returncode == 0
    assert members.get(ATTENTION) is None
