"""The compose actuator against recorded exchanges with a Docker Engine (20.10, docker-compose 1.29).

The recording (``recorded_docker.json``, fields that say nothing left out) has two expert instances at its start, in
project ``mesh``: 3, again 3, 1, 0, 2; then changes that cannot be made.
"""

import json
import socket
from pathlib import Path
from typing import Any

import httpx
import pytest

from services.scheduler.actuators.base import ActuatorFailed
from services.scheduler.actuators.compose import NUMBER, ComposeActuator, alike
from shared.messages import Pool
from tests.unit.recorded_api import Exchange, Recorded

RECORDED: dict[str, list[dict[str, Any]]] = json.loads((Path(__file__).parent / "recorded_docker.json").read_text())


async def play(name: str, count: int, pool: Pool = Pool.EXPERTS, project: str = "mesh") -> list[tuple[str, str]]:
    """Scale as it was recorded; every recorded request must come, and no other. Returns (method, path) of each."""
    recorded = Recorded([Exchange(**exchange) for exchange in RECORDED[name]], any_order=True)
    actuator = ComposeActuator("/var/run/docker.sock", project, recorded.transport)
    try:
        await actuator.scale(pool, count)
    finally:
        await actuator.close()
        assert not recorded.left
    return [(request.method, request.url.path) for request in recorded.requests]


def of(asked: list[tuple[str, str]], method: str, verb: str) -> int:
    return sum(m == method and path.endswith(verb) for m, path in asked)


async def test_a_container_more_is_made_like_the_first_connected_and_started():
    asked = await play("grow", 3)
    assert (of(asked, "POST", "/create"), of(asked, "POST", "/connect"), of(asked, "POST", "/start")) == (1, 1, 1)


async def test_as_many_as_there_are_changes_nothing():
    assert await play("same", 3) == [("GET", "/containers/json")]


async def test_those_with_the_highest_numbers_are_stopped_with_a_grace_period_and_removed():
    asked = await play("shrink", 1)
    assert (of(asked, "POST", "/stop"), sum(m == "DELETE" for m, _ in asked)) == (2, 2)
    stops = [exchange for exchange in RECORDED["shrink"] if exchange["path"].endswith("/stop")]
    assert all(exchange["query"] == {"t": "40"} for exchange in stops)


async def test_the_last_container_is_stopped_but_stays_to_make_others_like():
    asked = await play("to none", 0)
    assert (of(asked, "POST", "/stop"), sum(m == "DELETE" for m, _ in asked)) == (1, 0)
    back = await play("back", 2)
    assert (of(back, "POST", "/create"), of(back, "POST", "/start")) == (1, 2)


async def test_a_container_that_cannot_be_started_is_removed_again():
    with pytest.raises(ActuatorFailed, match="port is already allocated"):
        await play("port taken", 2, Pool.ATTENTION)
    assert RECORDED["port taken"][-1]["method"] == "DELETE"


async def test_an_image_that_is_gone_is_named():
    with pytest.raises(ActuatorFailed, match=r"mesh_experts_3 cannot be made of image moemesh-tiny; is it there\?"):
        await play("no image", 4)


async def test_a_project_without_the_service_is_named_with_what_to_do():
    with pytest.raises(ActuatorFailed, match=r"project other has no container of service experts.*--scale experts=1"):
        await play("no service", 2, project="other")


async def test_outside_of_a_container_the_project_must_be_named(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(socket, "gethostname", lambda: RECORDED["no project"][0]["path"].split("/")[2])
    with pytest.raises(ActuatorFailed, match="name the project with --compose-project"):
        await play("no project", 2, project="")


async def test_inside_of_a_container_the_project_is_its_own(monkeypatch: pytest.MonkeyPatch):
    pattern = first_container()
    monkeypatch.setattr(socket, "gethostname", lambda: "4a9976fb2935")
    own = Exchange("GET", "/containers/4a9976fb2935/json", pattern)
    recorded = Recorded([own, *(Exchange(**exchange) for exchange in RECORDED["same"])])
    await ComposeActuator("/var/run/docker.sock", "", recorded.transport).scale(Pool.EXPERTS, 3)
    assert not recorded.left


def first_container() -> dict[str, Any]:
    (found,) = (e["answer"] for e in RECORDED["grow"] if e["method"] == "GET" and "NetworkSettings" in e["answer"])
    return found


@pytest.mark.parametrize(
    ("name", "expected"),
    [("/mesh_experts_1", "mesh_experts_12"), ("/mesh-experts-1", "mesh-experts-12")],
    ids=["compose 1", "compose 2"],
)
def test_a_new_container_has_compose_s_name_and_labels_and_everything_else_of_the_first(name: str, expected: str):
    pattern: dict[str, Any] = first_container() | {"Name": name}
    made, body, others = alike(pattern, 12)
    assert made == expected
    assert body["Labels"] == pattern["Config"]["Labels"] | {NUMBER: "12"}
    for same in ("Image", "Env", "Cmd", "Entrypoint", "StopTimeout"):
        assert body[same] == pattern["Config"][same]
    assert body["HostConfig"] == pattern["HostConfig"]
    assert "Hostname" not in body
    networks = body["NetworkingConfig"]["EndpointsConfig"] | others
    assert networks == {net: {"Aliases": [expected, "experts"]} for net in ("mesh_default", "mesh_side")}


@pytest.mark.parametrize(
    ("path", "words"),
    [("absent.sock", "there is no .*absent.sock; mount the socket"), ("deaf.sock", "deaf.sock does not answer: ")],
)
async def test_a_socket_without_an_engine_is_named(tmp_path: Path, path: str, words: str):
    with socket.socket(socket.AF_UNIX) as deaf:
        deaf.bind(str(tmp_path / "deaf.sock"))
        with pytest.raises(ActuatorFailed, match=words):
            await ComposeActuator(str(tmp_path / path), "mesh").scale(Pool.EXPERTS, 2)


async def test_a_socket_that_may_not_be_used_is_said_with_what_to_do():
    def refuse(request: httpx.Request) -> httpx.Response:
        raise httpx.ConnectError("[Errno 13] Permission denied", request=request)

    actuator = ComposeActuator("/var/run/docker.sock", "mesh", httpx.MockTransport(refuse))
    with pytest.raises(ActuatorFailed, match=r"/var/run/docker.sock may not be used by this user; .*group_add"):
        await actuator.scale(Pool.EXPERTS, 2)
