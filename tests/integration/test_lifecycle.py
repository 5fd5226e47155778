"""The life of an instance on a real NATS server: announcing, refusing, failing, stopping by signals."""

import asyncio
import os
import signal
import sys
import urllib.error
import urllib.request
from asyncio.subprocess import DEVNULL, PIPE, Process
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest

from shared.bus import Bus
from shared.config import MeshConfig, load_config
from shared.errors import BusUnavailable, ConfigError, ModelError
from shared.lifecycle import Instance
from shared.membership import Members
from shared.messages import Kind, State
from shared.nats_server import NatsServer
from tests.integration.instances import MODEL, OTHER_MODEL, expert
from tests.integration.waiting import until

SERVICE = """
import asyncio, sys, threading
from shared.config import MeshConfig, load_config
from shared.lifecycle import Instance, run
from shared.messages import Kind
import os

async def serve(config, plan):
    async with Instance(Kind.EXPERTS, config) as instance:
        await instance.say("begun")
        if plan == "load":
            await asyncio.to_thread(threading.Event().wait)  # a load that never ends and cannot be interrupted
        await instance.ready(dict)
        if plan == "die":
            threading.Thread(target=lambda: instance.fail(RuntimeError("the compute thread died"))).start()
        await instance.until_stopped()
        await instance.say("draining")
        if plan == "drain":
            await asyncio.sleep(600)

config = load_config(MeshConfig, os.environ)
sys.exit(run(serve(config, sys.argv[1]), config))
"""


@pytest.fixture
def config(nats_server: NatsServer, mesh: str) -> MeshConfig:
    return MeshConfig(nats=nats_server.url, mesh=mesh, id="first")


@pytest.fixture
async def members(bus: Bus, mesh: str) -> Members:
    view = Members(mesh)
    await view.watch(bus)
    return view


@asynccontextmanager
async def process(config: MeshConfig, plan: str) -> AsyncIterator[Process]:
    """A service process that is killed at the end if it still lives."""
    environ = dict(os.environ) | {"MOEMESH_NATS": config.nats, "MOEMESH_MESH": config.mesh, "MOEMESH_ID": config.id}
    child = await asyncio.create_subprocess_exec(
        sys.executable, "-c", SERVICE, plan, env=environ, stdout=DEVNULL, stderr=PIPE, start_new_session=True
    )
    try:
        yield child
    finally:
        if child.returncode is None:
            child.kill()
        await child.communicate()


def status(url: str) -> int:
    try:
        with urllib.request.urlopen(url, timeout=5) as answer:
            return answer.status
    except urllib.error.HTTPError as error:
        return error.code


def state(members: Members, id: str) -> State | None:
    member = members.get(id)
    return member.heartbeat.state if member else None


async def test_others_see_every_state_of_an_instance(config: MeshConfig, members: Members) -> None:
    seen: list[tuple[State | None, str]] = []

    def note() -> None:
        member = members.get("first")
        seen.append((member.heartbeat.state, member.heartbeat.detail) if member else (None, ""))

    members.on_change(note)
    async with Instance(Kind.GATEWAY, config, signals=False) as instance:
        await instance.say("loading 50 %")
        await instance.ready(lambda: {"url": "http://elsewhere"})
        await until(lambda: state(members, "first") is State.READY)
        found = members.get("first")
        assert found is not None
        assert found.heartbeat.url == "http://elsewhere"
        instance.stop()
        await instance.until_stopped()
    await until(lambda: members.get("first") is None)
    wanted = [(State.STARTING, "loading 50 %"), (State.READY, ""), (State.DRAINING, ""), (None, "")]
    assert [entry for entry in seen if entry != (State.STARTING, "")] == wanted


async def test_a_newcomer_hears_of_everybody_at_once(config: MeshConfig, nats_server: NatsServer, mesh: str) -> None:
    async with (
        expert(config),
        Instance(Kind.GATEWAY, MeshConfig(nats=nats_server.url, mesh=mesh), signals=False) as new,
    ):
        assert [m.id for m in new.members.ready(Kind.EXPERTS)] == ["first"]


async def test_two_meshes_on_one_server_do_not_see_each_other(
    config: MeshConfig, members: Members, nats_server: NatsServer, mesh: str
) -> None:
    elsewhere = MeshConfig(nats=nats_server.url, mesh=mesh + "-2", id="second")
    async with expert(config), expert(elsewhere, OTHER_MODEL) as second:
        await until(lambda: members.get("first"))
        assert members.get("second") is None
        assert second.members.get("first") is None


async def test_the_http_side_answers(config: MeshConfig) -> None:
    async with Instance(Kind.EXPERTS, config, signals=False) as instance:
        statuses = [await asyncio.to_thread(status, instance.url + path) for path in ("/health", "/ready", "/x")]
        assert statuses == [200, 503, 404]
        await instance.ready(dict)
        assert await asyncio.to_thread(status, instance.url + "/ready") == 200
        assert await asyncio.to_thread(status, instance.url + "/metrics") == 200
        taken = MeshConfig(nats=config.nats, mesh=config.mesh, metrics_port=int(instance.url.rsplit(":", 1)[1]))
        with pytest.raises(ConfigError, match="cannot listen"):
            await Instance(Kind.EXPERTS, taken, signals=False).__aenter__()


async def test_another_model_is_refused_at_join(config: MeshConfig, nats_server: NatsServer, mesh: str) -> None:
    late = MeshConfig(nats=nats_server.url, mesh=mesh, id="late")
    async with expert(config) as first:
        with pytest.raises(ModelError, match=r"first has m \(digest aa\), here it is bb"):
            async with Instance(Kind.ATTENTION, late, signals=False) as instance:
                await instance.join(OTHER_MODEL)
        async with Instance(Kind.ATTENTION, late, signals=False) as instance:
            await instance.join(MODEL)
            await instance.ready(dict)
        await until(lambda: first.members.get("late") is None)


async def test_another_model_that_loaded_at_the_same_time_is_refused_when_it_wants_to_be_ready(
    config: MeshConfig, nats_server: NatsServer, mesh: str
) -> None:
    async with Instance(Kind.ATTENTION, MeshConfig(nats=nats_server.url, mesh=mesh), signals=False) as instance:
        await instance.join(OTHER_MODEL)
        async with expert(config):
            await until(lambda: instance.members.ready(Kind.EXPERTS))
            with pytest.raises(ModelError):
                await instance.ready(dict)


async def test_an_id_that_is_in_use_is_refused_and_its_owner_stays(config: MeshConfig, members: Members) -> None:
    async with expert(config):
        with pytest.raises(ConfigError, match="first is running already"):
            await Instance(Kind.EXPERTS, config, signals=False).__aenter__()
        await until(lambda: state(members, "first") is State.READY)


@pytest.mark.parametrize(
    ("setting", "value"), [("mesh", "a.b"), ("mesh", ""), ("mesh", "a>"), ("id", "x y"), ("id", "*")]
)
def test_names_that_are_no_subject_tokens_are_refused(setting: str, value: str) -> None:
    with pytest.raises(ConfigError, match=f"--{setting}"):
        Instance(Kind.EXPERTS, load_config(MeshConfig, {}, {setting: value}))


async def test_no_nats_server_is_an_error_with_its_url(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shared.lifecycle.CONNECT_LIMIT_S", 0.3)
    with pytest.raises(BusUnavailable, match=r"nats://127\.0\.0\.1:1"):
        await Instance(Kind.EXPERTS, MeshConfig(nats="nats://127.0.0.1:1"), signals=False).__aenter__()


async def test_facts_that_fail_stop_the_instance(config: MeshConfig) -> None:
    def broken() -> dict[str, object]:
        raise KeyError("no such fact")

    async def live() -> None:
        async with Instance(Kind.EXPERTS, config, signals=False) as instance:
            await instance.ready(dict)
            instance._facts = broken
            await instance.until_stopped()

    with pytest.raises(KeyError, match="no such fact"):
        await asyncio.create_task(live())


async def test_sigterm_drains_and_exits_zero(config: MeshConfig, members: Members) -> None:
    async with process(config, "serve") as child:
        await until(lambda: state(members, "first") is State.READY)
        child.send_signal(signal.SIGTERM)
        assert await child.wait() == 0
    await until(lambda: members.get("first") is None)


async def test_a_signal_while_loading_ends_it_although_the_load_cannot_be_interrupted(
    config: MeshConfig, members: Members
) -> None:
    async with process(config, "load") as child:
        await until(lambda: state(members, "first") is State.STARTING)
        child.send_signal(signal.SIGINT)
        assert await child.wait() == 0
    await until(lambda: members.get("first") is None)


async def test_a_second_signal_ends_a_long_drain_at_once(config: MeshConfig, members: Members) -> None:
    async with process(config, "drain") as child:
        await until(lambda: state(members, "first") is State.READY)
        child.send_signal(signal.SIGTERM)
        await until(lambda: state(members, "first") is State.DRAINING)
        child.send_signal(signal.SIGTERM)
        assert await child.wait() == 128 + signal.SIGTERM


async def test_a_dead_compute_thread_ends_the_process_with_its_error(config: MeshConfig, members: Members) -> None:
    async with process(config, "die") as child:
        _, stderr = await child.communicate()
        assert child.returncode == 1
    assert b"RuntimeError: the compute thread died" in stderr
    await until(lambda: members.get("first") is None)


async def test_heartbeats_go_on_after_nats_was_killed(
    config: MeshConfig, members: Members, nats_server: NatsServer
) -> None:
    async with expert(config) as instance:
        await until(lambda: members.get("first"))
        await nats_server.kill()
        await until(lambda: not instance.bus.connected)
        await nats_server.start()
        before = members.all()[0].last_seen
        await until(lambda: members.all()[0].last_seen > before, "a heartbeat after the restart")
        assert not members.all()[0].suspect
