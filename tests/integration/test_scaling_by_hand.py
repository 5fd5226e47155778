"""Scaling pools by hand while the mesh serves: nothing fails, no byte changes, and what cannot be done is said."""

import io
import time
from collections.abc import AsyncIterator, Iterator
from dataclasses import replace
from typing import Any

import httpx
import pytest
from rich.console import Console

from shared.bus import Bus
from shared.cli.scale import NotScaled, ask, until_reached
from shared.cli.status import describe, look
from shared.config import MeshConfig
from shared.lifecycle import Instance
from shared.membership import Members
from shared.messages import Kind, Pool
from shared.nats_server import NatsServer
from shared.pool_messages import Scale
from tests.integration.instances import expert
from tests.integration.test_scheduler_placement import scheduler
from tests.integration.waiting import until
from tests.mesh import RunningMesh, running_mesh
from tests.traffic import traffic

LIMIT_S = 120.0
BODY = {"prompt": "In the beginning God created", "max_tokens": 150, "temperature": 0, "ignore_eos": True}
SETTINGS = {"drain_s": "3", "no_home_deadline": "100"}


@pytest.fixture(scope="module")
def mesh() -> Iterator[RunningMesh]:
    with running_mesh(attention=1, experts=1, mesh="scale", settings=SETTINGS) as running:
        yield running


def has_processes(mesh: RunningMesh, *names: str) -> bool:
    """Whether those of the pools are these, in time: one that has said goodbye may take a while to end."""
    give_up = time.monotonic() + LIMIT_S
    while sorted(n for n in mesh.mesh.children if n.startswith(("attention", "experts"))) != list(names):
        if time.monotonic() > give_up:
            return False
        time.sleep(0.05)
    return True


def seen(mesh: RunningMesh) -> dict[str, Any]:
    """The report of ``moemesh status``."""
    return describe(*mesh.call(look(mesh.mesh.nats_url, mesh.mesh.options.mesh)))


def test_both_pools_grow_shrink_and_go_to_none_under_streams_without_a_failure_or_another_byte(mesh: RunningMesh):
    expected = mesh.complete(**BODY)["choices"][0]["text"]
    assert "local starts 1" in mesh.scale(Pool.EXPERTS, 2, dry_run=True)
    assert has_processes(mesh, "attention-0", "experts-0")
    with traffic(mesh.url, BODY, 3) as streams:
        assert "experts: 2 ready" in mesh.scale(Pool.EXPERTS, 2)
        streams.until_more(streams.finished)
        shown = mesh.scale(Pool.EXPERTS, 0)
        assert "local drains 2" in shown
        assert "requests wait" in shown
        assert has_processes(mesh, "attention-0")
        mesh.scale(Pool.EXPERTS, 1)
        streams.until_more(streams.finished)
        mesh.scale(Pool.ATTENTION, 2)
        streams.until_more(streams.finished)
        assert has_processes(mesh, "attention-0", "attention-1", "experts-0")
        mesh.scale(Pool.ATTENTION, 1)
        streams.until_more(streams.finished)
        assert streams.end() == {expected}
    assert has_processes(mesh, "attention-0", "experts-0")
    assert "nothing to do" in mesh.scale(Pool.ATTENTION, 1)
    assert mesh.metrics_of("scheduler-0")('moemesh_pool_changes_total{outcome="made",pool="experts"}') == 3


def test_what_is_desired_survives_a_scheduler_that_is_killed(mesh: RunningMesh):
    mesh.scale(Pool.EXPERTS, 2)
    mesh.kill("scheduler-0")
    mesh.call(mesh.mesh.scale("experts", 1))
    assert has_processes(mesh, "attention-0", "experts-0")
    mesh.call(reached(mesh, Pool.EXPERTS, 2))
    assert has_processes(mesh, "attention-0", "experts-0", "experts-1")
    assert seen(mesh)["pools"]["experts"] == {"desired": 2, "ready": 2, "problem": ""}
    mesh.scale(Pool.EXPERTS, 1)


async def reached(mesh: RunningMesh, pool: Pool, count: int) -> None:
    bus = await Bus.connect(mesh.mesh.nats_url, "test")
    members = Members(mesh.mesh.options.mesh)
    await members.watch(bus)
    await until_reached(members, pool, count, LIMIT_S)
    await bus.close()


def test_an_actuator_that_refuses_leaves_everything_as_it_was_and_status_says_why():
    settings = {"actuator": "compose", "docker_socket": "/nowhere/docker.sock"}
    with running_mesh(attention=1, experts=1, mesh="scale-refused", settings=settings) as mesh:
        before = {name: child.process for name, child in mesh.mesh.children.items()}
        with pytest.raises(NotScaled, match=r"experts: 2 wanted, attempt 1 failed: .*there is no /nowhere/docker.sock"):
            mesh.scale(Pool.EXPERTS, 2)
        report = seen(mesh)
        assert report["pools"]["experts"]["desired"] == 2
        assert report["pools"]["experts"]["ready"] == 1
        assert "mount the socket" in report["pools"]["experts"]["problem"]
        (detail,) = (row["detail"] for row in report["instances"] if row["kind"] == "scheduler")
        assert "there is no /nowhere/docker.sock" in detail
        assert {name: child.process for name, child in mesh.mesh.children.items()} == before
        assert mesh.complete(**BODY)["choices"]
        assert "experts: 1 ready" in mesh.scale(Pool.EXPERTS, 1)
        assert seen(mesh)["pools"]["experts"]["problem"] == ""


# ---- one scheduler, and expert instances without a model behind them ----------------------------------------


@pytest.fixture
def config(nats_server: NatsServer, mesh_name: str) -> MeshConfig:
    return MeshConfig(nats=nats_server.url, mesh=mesh_name)


@pytest.fixture
def mesh_name() -> str:
    return "scale-one"


@pytest.fixture
async def watcher(config: MeshConfig) -> AsyncIterator[Instance]:
    async with Instance(Kind.GATEWAY, replace(config, id="watcher"), signals=False) as instance:
        yield instance


async def by_hand(config: MeshConfig, pool: Pool, count: int, dry_run: bool = False) -> str:
    out = io.StringIO()
    await ask(config.nats, config.mesh, Scale(pool=pool, count=count, dry_run=dry_run), Console(file=out), 0.0)
    return out.getvalue()


@pytest.mark.parametrize(
    ("actuator", "pool", "count", "words"),
    [
        ("none", Pool.EXPERTS, 2, r"set the scheduler's --actuator"),
        ("external", Pool.ATTENTION, 0, r"attention: 0 instances; there must be at least 1"),
        ("external", Pool.EXPERTS, -1, r"experts: -1 instances; there must be at least 0"),
        ("external", Pool.EXPERTS, 65, r"at most 64"),
        ("external", Pool.EXPERTS, 1, r"1 expert instances with 3 slots .* cannot hold 4 experts: it takes 2"),
    ],
)
async def test_what_cannot_be_is_refused_and_nothing_is_desired(
    config: MeshConfig, watcher: Instance, actuator: str, pool: Pool, count: int, words: str
) -> None:
    async with (
        scheduler(config, "s1", actuator=actuator),
        expert(replace(config, id="e1"), slots=6),
        expert(replace(config, id="e2"), slots=6),
    ):
        await until(lambda: len(watcher.members.ready(Kind.EXPERTS)) == 2 and watcher.members.ready(Kind.SCHEDULER))
        for dry_run in (True, False):
            with pytest.raises(NotScaled, match=words):
                await by_hand(config, pool, count, dry_run)
        await watcher.announce()
        assert all(not member.heartbeat.pools for member in watcher.members.all())


async def test_what_is_desired_is_shown_to_whoever_sees_to_it(config: MeshConfig, watcher: Instance) -> None:
    async with scheduler(config, "s1", actuator="external"), httpx.AsyncClient() as http:
        await until(lambda: watcher.members.ready(Kind.SCHEDULER))
        url = watcher.members.ready(Kind.SCHEDULER)[0].heartbeat.url
        assert (await http.get(url + "/desired")).json() == {}
        assert "moemesh_desired_instances{" not in (await http.get(url + "/metrics")).text
        assert "external starts 3" in await by_hand(config, Pool.EXPERTS, 3)
        await by_hand(config, Pool.ATTENTION, 2)
        answer = await http.get(url + "/desired")
        assert answer.json() == {"experts": 3, "attention": 2}
        assert answer.headers["content-type"] == "application/json"
        assert 'moemesh_desired_instances{pool="experts"} 3.0' in (await http.get(url + "/metrics")).text


async def test_another_scheduler_goes_on_with_what_is_desired(config: MeshConfig, watcher: Instance) -> None:
    def pools(id: str) -> list[tuple[Pool, int]]:
        member = watcher.members.get(id)
        return [(fact.pool, fact.desired) for fact in member.heartbeat.pools] if member else []

    async with scheduler(config, "s1", actuator="external"):
        await until(lambda: watcher.members.ready(Kind.SCHEDULER))
        await by_hand(config, Pool.EXPERTS, 3)
        await until(lambda: pools("s1") == [(Pool.EXPERTS, 3)])
    async with scheduler(config, "s2", actuator="external"):
        await until(lambda: pools("s2") == [(Pool.EXPERTS, 3)], "s2 leads and knows what is desired")
