"""A gateway in this process with fake attention instances behind a real NATS server."""

import asyncio
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx

from services.gateway import main as gateway_main
from shared.bus import Bus
from shared.config import GatewayConfig
from shared.membership import Members
from shared.messages import Kind
from shared.models.source import ModelSource, open_source
from shared.nats_server import NatsServer
from tests.api.fake_attention import FakeAttention

LIMIT_S = 30.0


async def until(condition: Callable[[], Any], limit: float = LIMIT_S) -> Any:
    """Wait until ``condition()`` is true; returns its value."""
    async with asyncio.timeout(limit):
        while not (value := condition()):  # noqa: ASYNC110  (any condition, not only events)
            await asyncio.sleep(0.01)
        return value


async def until_async(condition: Callable[[], Awaitable[bool]], limit: float = LIMIT_S) -> None:
    async with asyncio.timeout(limit):
        while not await condition():  # noqa: ASYNC110
            await asyncio.sleep(0.02)


@dataclass
class FakeMesh:
    nats: NatsServer
    bus: Bus
    mesh: str
    source: ModelSource
    members: Members
    url: str = ""
    fakes: list[FakeAttention] = field(default_factory=list)

    @property
    def fake(self) -> FakeAttention:
        return self.fakes[0]

    async def add(self, **facts: Any) -> FakeAttention:
        """One more attention instance; returns when the mesh has seen it."""
        fake = FakeAttention(self.bus, self.mesh, self.source.facts(), self.source.spec.vocab_size, **facts)
        await fake.start()
        self.fakes.append(fake)
        return fake

    async def status(self, path: str) -> int:
        async with httpx.AsyncClient() as client:
            return (await client.get(self.url + path)).status_code

    async def until_status(self, path: str, status: int) -> None:
        async def reached() -> bool:
            return await self.status(path) == status

        await until_async(reached)


@asynccontextmanager
async def fake_mesh(directory: Path, attention: int = 1, **settings: Any) -> AsyncIterator[FakeMesh]:
    """NATS, ``attention`` fakes and a gateway with ``settings``; ready when there is a fake, else just listening."""
    mesh = "api-test"
    async with AsyncExitStack() as stack:
        nats = await stack.enter_async_context(NatsServer(directory / "nats"))
        bus = await Bus.connect(nats.url, "fakes")
        stack.push_async_callback(bus.close)
        members = Members(mesh, "test-watcher")
        await members.watch(bus)
        running = FakeMesh(nats, bus, mesh, open_source(settings.get("model", "")), members)
        for number in range(attention):
            await running.add(id=f"attention-{number}")
        stack.push_async_callback(_stop_fakes, running)
        config = GatewayConfig(mesh=mesh, nats=nats.url, port=0, node="test", **settings)
        task = asyncio.create_task(gateway_main.serve(config, signals=False))
        stack.push_async_callback(_stop, task)
        gateway = await until(lambda: task.done() or members.ready(Kind.GATEWAY))
        if task.done():
            task.result()
        running.url = gateway[0].heartbeat.url
        if attention:
            await running.until_status("/ready", 200)
        yield running


async def _stop(task: asyncio.Task[None]) -> None:
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)


async def _stop_fakes(mesh: FakeMesh) -> None:
    for fake in mesh.fakes:
        await fake.die()


@contextmanager
def in_thread(directory: Path, **settings: Any) -> Iterator[FakeMesh]:
    """The same in a loop on a thread of its own, for synchronous tests."""
    started: list[tuple[FakeMesh, asyncio.AbstractEventLoop, asyncio.Event]] = []
    up = threading.Event()

    async def life() -> None:
        down = asyncio.Event()
        async with fake_mesh(directory, **settings) as mesh:
            started.append((mesh, asyncio.get_running_loop(), down))
            up.set()
            await down.wait()

    def target() -> None:
        try:
            asyncio.run(life())
        finally:
            up.set()

    thread = threading.Thread(target=target, daemon=True)
    thread.start()
    assert up.wait(LIMIT_S) and started, "the gateway did not start"
    mesh, loop, down = started[0]
    try:
        yield mesh
    finally:
        loop.call_soon_threadsafe(down.set)
        thread.join(LIMIT_S)
