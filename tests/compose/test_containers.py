"""Guards the image and the compose files: a mesh of containers serves, and scales while it serves."""

import json
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Any

import pytest

from tests.compose.engine import CommandFailed, Engine

pytestmark = [pytest.mark.containers, pytest.mark.timeout(1500)]

URL = "http://127.0.0.1:8000"
READY_LIMIT_S = 480.0
QUESTION = {"prompt": "In the beginning", "max_tokens": 24, "temperature": 0}


@pytest.fixture
def mesh(engine: Engine) -> Iterator[Engine]:
    """One gateway, scheduler and attention instance and two of experts; shows their logs when the test fails."""
    try:
        engine.compose("up", "--detach", "--no-build", "--scale", "experts=2")
        yield engine
        print(logs(engine))
    finally:
        engine.compose("down", "--timeout", "20")
        with suppress(CommandFailed):  # there is none where `up` has failed
            engine.command("docker", "volume", "rm", "mesh_nats")  # compiled kernels stay for the next mesh


def logs(engine: Engine) -> str:
    """Of all containers, as far as they can be had: compose gives up when one of them goes while it reads."""
    try:
        return engine.compose("logs", "--no-color", "--tail", "40")
    except CommandFailed as failed:
        return str(failed)


def until(engine: Engine, what: str, holds: Callable[[], bool]) -> None:
    """Fails, with the logs, when ``what`` does not come to hold in time."""
    deadline = time.monotonic() + READY_LIMIT_S
    while not holds():
        if time.monotonic() > deadline:
            pytest.fail(f"not {what} within {READY_LIMIT_S:.0f} s:\n{engine.compose('ps')}\n{logs(engine)}")
        time.sleep(0.5)


def status(engine: Engine) -> dict[str, Any]:
    """What ``moemesh status`` says inside the mesh."""
    return json.loads(engine.compose("exec", "-T", "gateway", "moemesh", "status", "--json"))


def serving_experts(engine: Engine) -> int:
    """READY expert instances that are homes and hold the placement that attention uses now."""
    report = status(engine)
    homes = (report["placement"] or {"homes": {}})["homes"]
    used = {row["facts"].get("placement") for row in report["instances"] if row["kind"] == "attention"}
    experts = [row for row in report["instances"] if row["kind"] == "experts" and row["state"] == "ready"]
    return sum(homes.get(row["id"], 0) > 0 and {row["facts"]["placement"]} == used for row in experts)


def complete(engine: Engine) -> str:
    code, text = engine.ask(f"{URL}/v1/completions", QUESTION)
    assert code == 200, text
    return json.loads(text)["choices"][0]["text"]


def test_a_mesh_of_containers_serves_and_scales_from_two_to_three_expert_instances(mesh: Engine):
    until(mesh, "ready", lambda: mesh.ask(f"{URL}/ready", limit_s=5)[0] == 200)
    until(mesh, "served by two", lambda: serving_experts(mesh) == 2)
    first = complete(mesh)
    assert len(first) > 10
    mesh.compose("up", "--detach", "--no-build", "--no-recreate", "--scale", "experts=3")
    until(mesh, "served by three", lambda: serving_experts(mesh) == 3)
    assert complete(mesh) == first

    nodes = {row["node"] for row in status(mesh)["instances"]}
    assert len(nodes) == 1, "containers of one host are one node"
    user = mesh.compose("exec", "-T", "experts", "id", "--user").strip()
    assert user != "0"


def scale(engine: Engine, pool: str, count: int) -> str:
    """What a person sees of ``moemesh scale`` inside the mesh, once it is done."""
    return engine.compose("exec", "-T", "gateway", "moemesh", "scale", pool, str(count), "--wait", "150", limit_s=240)


def running(engine: Engine, service: str) -> list[str]:
    """Names of a service's running containers, as compose knows them."""
    ids = engine.compose("ps", "--quiet", service).split()
    found = engine.command("docker", "ps", "--no-trunc", "--format", "{{.ID}} {{.Names}}").splitlines()
    return sorted(line.split()[1] for line in found if line.split()[0] in ids)


def test_the_scheduler_starts_and_stops_containers_and_compose_takes_them_for_its_own(mesh: Engine):
    until(mesh, "ready", lambda: mesh.ask(f"{URL}/ready", limit_s=5)[0] == 200)
    first, before = complete(mesh), running(mesh, "experts")
    assert "experts: 3 ready" in scale(mesh, "experts", 3)
    assert running(mesh, "experts") == [*before, before[0][:-1] + "3"]
    assert "attention: 2 ready" in scale(mesh, "attention", 2)
    assert complete(mesh) == first
    assert "experts: 0 ready" in scale(mesh, "experts", 0)
    until(mesh, "without experts", lambda: not running(mesh, "experts"))
    assert "experts: 1 ready" in scale(mesh, "experts", 1)
    assert running(mesh, "experts") == before[:1]
    assert "attention: 1 ready" in scale(mesh, "attention", 1)
    assert complete(mesh) == first


def test_one_image_explains_every_service(engine: Engine):
    text = engine.command("docker", "run", "--rm", "--network", "none", "moemesh-test", "--help")
    assert all(kind in text for kind in ("gateway", "attention", "experts", "scheduler"))
