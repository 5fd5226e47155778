"""Fixtures that every test may use: a real NATS server of its own, a connection, a mesh name."""

import secrets
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from shared.bus import Bus
from shared.nats_server import NatsServer


@pytest.fixture
def mesh() -> str:
    """A mesh name that no other test uses."""
    return f"test-{secrets.token_hex(4)}"


@pytest.fixture
async def nats_server(tmp_path: Path) -> AsyncIterator[NatsServer]:
    """A server on a free port with a JetStream store of its own."""
    async with NatsServer(tmp_path / "nats") as server:
        yield server


@pytest.fixture
async def bus(nats_server: NatsServer) -> AsyncIterator[Bus]:
    bus = await Bus.connect(nats_server.url, "test")
    yield bus
    await bus.close()
