"""``moemesh up`` as a person or a supervisor runs it: one ready line, clean stop, clear failures, restarts."""

import asyncio
import json
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import httpx
import pytest

from shared.models.presets import make_checkpoint
from tests.integration.waiting import until
from tests.up import START_LIMIT_S, STOP_LIMIT_S, ready_url, up


def descendants(pid: int) -> set[int]:
    """Pids of all processes below ``pid``."""
    children: dict[int, set[int]] = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rsplit(")", 1)[1].split()
        except OSError:
            continue
        children.setdefault(int(fields[1]), set()).add(int(stat.parent.name))
    found, todo = set(), [pid]
    while todo:
        new = children.get(todo.pop(), set())
        found |= new
        todo += new
    return found


def alive(pids: set[int]) -> set[int]:
    return {p for p in pids if Path(f"/proc/{p}/stat").exists() and " Z " not in Path(f"/proc/{p}/stat").read_text()}


def test_up_prints_one_ready_line_serves_and_stops_with_status_zero() -> None:
    with up() as (process, _):
        url = ready_url(process)
        answer = httpx.post(url + "/v1/completions", json={"prompt": "In the", "max_tokens": 4}, timeout=60)
        assert answer.status_code == 200
        below = descendants(process.pid)
        assert len(below) >= 6
        seen = subprocess.run(
            [sys.executable, "-m", "shared.cli.main", "status", "--json"], capture_output=True, text=True, timeout=60
        )
        assert sorted(i["state"] for i in json.loads(seen.stdout)["instances"]) == ["ready"] * 5
        process.terminate()
        assert process.wait(STOP_LIMIT_S) == 0
        assert process.stdout is not None
        assert process.stdout.read() == ""
        assert not alive(below)


def test_a_killed_up_leaves_no_service_behind() -> None:
    with up() as (process, _):
        ready_url(process)
        below = descendants(process.pid)
        process.kill()
        process.wait(STOP_LIMIT_S)
        waiter = threading.Event()
        for _ in range(STOP_LIMIT_S * 10):
            if not alive(below):
                break
            waiter.wait(0.1)
        assert not alive(below)


@pytest.mark.parametrize("problem", ["missing", "foreign"])
def test_a_model_that_cannot_be_served_ends_up_with_its_reason(problem: str, tmp_path: Path) -> None:
    path = tmp_path / "model"
    if problem == "foreign":
        path.mkdir()
        (path / "config.json").write_text(json.dumps({"model_type": "llama", "architectures": ["LlamaForCausalLM"]}))
    with up("--model", str(path)) as (process, lines):
        assert process.wait(START_LIMIT_S) == 1
        assert process.stdout is not None
        assert process.stdout.read() == ""
    text = "".join(lines)
    assert str(path) in text
    if problem == "foreign":
        assert "qwen3_moe" in text
        assert "mixtral" in text


@pytest.fixture
def hub(tmp_path: Path) -> dict[str, str]:
    """The environment of a host without network whose hub cache holds acme/tiny."""
    entry = tmp_path / "hub" / "models--acme--tiny"
    make_checkpoint("tiny-qwen3", entry / "snapshots" / "0123abcd")
    (entry / "refs").mkdir()
    (entry / "refs" / "main").write_text("0123abcd")
    elsewhere = dict.fromkeys(("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE"), str(tmp_path / "hub"))
    return {"HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1"} | {k: v for k, v in elsewhere.items() if k in os.environ}


def test_a_hub_id_in_the_cache_is_served_without_network(hub: dict[str, str]) -> None:
    with up("--model", "acme/tiny", "--experts", "1", **hub) as (process, _):
        url = ready_url(process)
        assert httpx.get(url + "/v1/models", timeout=60).json()["data"][0]["id"] == "acme/tiny"
        answer = httpx.post(url + "/v1/completions", json={"prompt": "In the", "max_tokens": 4}, timeout=60)
        assert answer.status_code == 200
        process.terminate()
        assert process.wait(STOP_LIMIT_S) == 0


def test_a_hub_id_that_is_not_in_the_cache_is_named(hub: dict[str, str]) -> None:
    with up("--model", "acme/other", **hub) as (process, lines):
        assert process.wait(START_LIMIT_S) == 1
    assert "acme/other: is not a directory, not (completely) in the hub's cache" in "".join(lines)


def test_a_service_that_dies_is_restarted_and_the_mesh_serves_again_until_it_is_interrupted() -> None:
    with up() as (process, lines):
        url = ready_url(process)
        asyncio.run(until(lambda: sum("experts-" in line and line.endswith(" ready\n") for line in lines) == 2))
        status = subprocess.run(["pgrep", "-f", "serve experts"], capture_output=True, text=True, check=False)
        experts = {int(p) for p in status.stdout.split()} & descendants(process.pid)
        assert len(experts) == 2
        os.kill(experts.pop(), signal.SIGKILL)
        body = {"prompt": "And God said", "max_tokens": 8, "temperature": 0}
        answers = [httpx.post(url + "/v1/completions", json=body, timeout=120).json() for _ in range(3)]
        assert len({a["choices"][0]["text"] for a in answers}) == 1
        below = descendants(process.pid)
        process.send_signal(signal.SIGINT)
        assert process.wait(STOP_LIMIT_S) == 0
        assert not alive(below)
    assert any("starting it again" in line for line in lines)
