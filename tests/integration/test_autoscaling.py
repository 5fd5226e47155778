"""A paced mesh that is sized by demand: instances come and go with the load, and nobody can tell by the answers."""

import io
import json
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import pytest
from rich.console import Console

from shared.cli.client import stream_completion
from shared.cli.status import describe, look, print_report
from shared.messages import Pool
from shared.models.source import open_source
from tests.mesh import RunningMesh, running_mesh
from tests.unit.autoscale_cases import EXPERT_S, ROW_S, fitted, write_profile

LIMIT_S = 240.0
BODY = {"prompt": "In the beginning God created", "max_tokens": 24, "temperature": 0, "ignore_eos": True}
LOW, HIGH = 0.25, 2.0
"""Requests per second: what one expert instance serves in time, and what takes more."""
FIGURES = {"name": "autoscale", "attention_row_s": ROW_S, "experts_s": 0.5e-3, "expert_s": EXPERT_S, "head_s": 2e-3}


@dataclass
class Load:
    """Requests that come at a rate, whether earlier ones have been answered or not."""

    url: str
    pool: ThreadPoolExecutor
    rate: float = HIGH
    over: threading.Event = field(default_factory=threading.Event)
    answers: list[Future[str]] = field(default_factory=list)

    def keep_asking(self) -> None:
        while not self.over.wait(1 / self.rate):
            self.answers.append(self.pool.submit(lambda: "".join(stream_completion(self.url, dict(BODY)))))

    def texts(self) -> set[str]:
        """Of all requests. Raises what one of them has raised."""
        return {answer.result(LIMIT_S) for answer in self.answers}


@contextmanager
def loaded(mesh: RunningMesh) -> Iterator[Load]:
    with ThreadPoolExecutor(256) as pool:
        load = Load(mesh.url, pool)
        asking = threading.Thread(target=load.keep_asking)
        asking.start()
        try:
            yield load
        finally:
            load.over.set()
            asking.join()


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """A profile of paced instances, exactly as they are paced."""
    directory = tmp_path_factory.mktemp("autoscaling")
    (directory / "pace.json").write_text(json.dumps(FIGURES))
    write_profile(directory / "fitted.json", fitted(), open_source("").digest)
    times = {"autoscale_window_s": "2", "autoscale_cooldown_s": "3", "autoscale_idle_s": "2"}
    files = {"pace": str(directory / "pace.json"), "profile": str(directory / "fitted.json")}
    return {**files, **times, "slo_tpot_ms": "120", "drain_s": "10", "no_home_deadline": "100"}


def seen(mesh: RunningMesh) -> dict[str, Any]:
    """The report of ``moemesh status``."""
    return describe(*mesh.call(look(mesh.mesh.nats_url, mesh.mesh.options.mesh)))


def ready(report: dict[str, Any], kind: str) -> int:
    return sum(row["kind"] == kind and row["state"] == "ready" for row in report["instances"])


def desired(report: dict[str, Any]) -> int:
    """Expert instances."""
    return report["pools"]["experts"]["desired"]


def until(mesh: RunningMesh, what: Callable[[dict[str, Any]], bool]) -> dict[str, Any]:
    """The first report of which it is true."""
    give_up = time.monotonic() + LIMIT_S
    while not what(report := seen(mesh)):
        assert time.monotonic() < give_up, report
    return report


def test_pools_follow_the_load_and_a_hand_and_no_answer_changes(settings: dict[str, str]) -> None:
    two = {"autoscale": "on", "autoscale_max_attention": "2", "autoscale_max_experts": "2"}
    with running_mesh(attention=1, experts=1, mesh="auto", settings=settings | two) as mesh:
        expected = mesh.complete(**BODY)["choices"][0]["text"]
        with loaded(mesh) as load:
            grown = until(mesh, lambda report: ready(report, "experts") >= 2)
            assert desired(grown) >= 2
            assert grown["autoscaling"]["mode"] == "on"
            assert "requests/s" in grown["autoscaling"]["why"]
            load.rate = LOW
            until(mesh, lambda report: ready(report, "experts") == 1 and ready(report, "attention") == 1)
            assert "autoscaling goes on after 3 s" in mesh.scale(Pool.EXPERTS, 2, limit=0.0)
            until(mesh, lambda report: desired(report) == 2)
            until(mesh, lambda report: desired(report) == 1 and ready(report, "experts") == 1)
        assert load.texts() == {expected}
        metrics = mesh.metrics_of("scheduler-0")
        assert metrics('moemesh_autoscale_changes_total{pool="experts"}') >= 2


def test_only_observing_changes_nothing_and_says_what_it_would_do(settings: dict[str, str]) -> None:
    with running_mesh(attention=1, experts=1, mesh="auto-see", settings=settings | {"autoscale": "observe"}) as mesh:
        with loaded(mesh) as load:
            report = until(mesh, lambda report: "would change" in report["autoscaling"]["doing"])
        assert report["autoscaling"]["sizes"]["experts"] > 1
        assert report["pools"] == {}
        shown = io.StringIO()
        print_report(report, Console(file=shown, width=200))
        assert "autoscaling observe: " in shown.getvalue()
        assert "would change experts 1 -> " in shown.getvalue()
        load.texts()
        assert sorted(mesh.mesh.children) == ["attention-0", "experts-0", "gateway-0", "scheduler-0"]


def test_an_idle_expert_pool_goes_to_none_and_a_request_brings_it_back(settings: dict[str, str]) -> None:
    zero = settings | {"autoscale": "on", "autoscale_min_experts": "0", "autoscale_max_experts": "1"}
    with running_mesh(attention=1, experts=1, mesh="auto-zero", settings=zero) as mesh:
        expected = mesh.complete(**BODY)["choices"][0]["text"]
        until(mesh, lambda report: ready(report, "experts") == 0)
        assert mesh.complete(**BODY)["choices"][0]["text"] == expected
        until(mesh, lambda report: ready(report, "experts") == 0)
