"""Fixtures that every test may use: a real NATS server of its own, a connection, a mesh name."""

import os
import secrets
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from hypothesis import settings

from shared.bus import Bus
from shared.kernels.threads import thread_environment
from shared.nats_server import NatsServer


def pytest_configure() -> None:
    """Kernels want their environment before torch and numba are imported, as in the services. No example is timed."""
    os.environ.update(thread_environment(len(os.sched_getaffinity(0)), os.environ))
    settings.register_profile("untimed", deadline=None)
    settings.load_profile("untimed")


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
