"""Prompts that travel in several messages, over real NATS: nothing is lost, and the output is the same."""

import asyncio
from collections.abc import AsyncIterator, Iterator

import pytest

from services.gateway import requests
from services.gateway.requests import Job, OpenRequest
from services.gateway.router import Router
from shared.bus import Bus
from shared.membership import Members
from shared.messages import Kind
from shared.models.source import open_source
from shared.nats_server import NatsServer
from shared.request_messages import Decision, SamplingParams, Submit
from shared.store import MAX_MESSAGE_BYTES
from tests.integration.test_attention_server import serving
from tests.integration.waiting import until
from tests.mesh import RunningMesh, running_mesh
from tests.unit.toy_engine import int32

MESH = "parts"
PROMPT = [1 + i * 37 % 4000 for i in range(1500)]


@pytest.fixture(scope="module")
def running() -> Iterator[RunningMesh]:
    with running_mesh(attention=1, experts=1, mesh=MESH) as mesh:
        yield mesh


@pytest.fixture
async def router(running: RunningMesh) -> AsyncIterator[Router]:
    """A gateway's router of our own, beside the mesh's gateway."""
    bus = await Bus.connect(running.mesh.nats_url, "test")
    members = Members(MESH)
    await members.watch(bus)
    router = Router(bus, members, MESH, "gateway-test", open_source("").digest, patience=10.0)
    await router.start()
    await until(lambda: members.ready(Kind.ATTENTION), "attention")
    yield router
    await router.close()
    await bus.close()


async def generated(router: Router, loop_time: float) -> list[int]:
    job = Job(0, PROMPT, SamplingParams(max_tokens=20, temperature=0))
    return [token async for update in router.run(job, loop_time + 120) for token in update.tokens]


async def test_a_prompt_in_many_messages_gives_the_same_output(router: Router, monkeypatch: pytest.MonkeyPatch) -> None:
    now = asyncio.get_running_loop().time()
    whole = await generated(router, now)
    assert len(whole) == 20
    monkeypatch.setattr(requests, "PART_TOKENS", 64)
    assert await generated(router, now) == whole
    monkeypatch.setattr(requests, "PART_TOKENS", len(PROMPT))
    assert await generated(router, now) == whole


async def test_a_prompt_longer_than_a_bus_message_arrives_whole(
    nats_server: NatsServer, bus: Bus, mesh: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompt = [i * 7919 % 50 for i in range(200_000)]
    request = OpenRequest(Job(0, prompt, SamplingParams(max_tokens=1)))
    request.assign("a", 1)
    messages = request.submits("g", 60.0, may_wait=False)
    assert sum(len(message.encode()) for message in messages) > MAX_MESSAGE_BYTES
    taken: list[Submit] = []

    def submit(request: Submit, trace: object = None) -> Decision:
        taken.append(request)
        return Decision(ok=True)

    async with serving(nats_server, bus, mesh, max_model_len=300_000) as s:
        monkeypatch.setattr(s.toy.engine, "submit", submit)
        for message in messages:
            assert not taken
            assert (await bus.request(s.subject, message, Decision, 10.0)).ok
    assert [one.prompt for one in taken] == [int32(prompt)]
