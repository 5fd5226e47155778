"""Experts that come and go change nothing but the time: every exchange gets its parts, with any budget."""

import time
from typing import Any

import numpy as np
import pytest

from services.experts.elastic import Elastic
from shared.elastic.eviction import Eviction
from shared.errors import ExchangeUnavailable
from shared.predictors.base import Predictor
from shared.transport.base import FrameKind
from shared.transport.faults import Faults, Rates
from shared.transport.memory import MemoryNetwork
from tests.unit.toy_elastic import elastic_with
from tests.unit.toy_experts import EXPERTS, LAYERS, TOP_K, ToyMesh, everywhere, round_robin, toy_mesh

PATIENT: dict[str, Any] = {"deadline": 20.0, "give_up": 60.0}


def elastics(mesh: ToyMesh) -> list[Elastic]:
    found = [instance.server._elastic for instance in mesh.instances]
    assert all(found)
    return [elastic for elastic in found if elastic]


@pytest.mark.parametrize("eviction", list(Eviction))
@pytest.mark.parametrize("slots", [1, 2, 3, 5, 2 * EXPERTS])
@pytest.mark.parametrize("homes", [everywhere(1), round_robin(2), everywhere(2)], ids=["one", "apart", "both"])
def test_any_budget_gives_the_same_bytes(homes, slots, eviction):
    with toy_mesh(homes, make_elastic=elastic_with(slots, eviction=eviction), **PATIENT) as mesh:
        for step in range(12):
            mesh.check(step, LAYERS[step % 2], rows=1 + 5 * (step % 3))
        for elastic in elastics(mesh):
            assert elastic.residents <= slots
            assert elastic.stats.waits <= elastic.stats.calls


def test_with_room_for_all_each_expert_is_started_once():
    with toy_mesh(everywhere(1), make_elastic=elastic_with(2 * EXPERTS), **PATIENT) as mesh:
        for step in range(20):
            mesh.check(step, LAYERS[step % 2], rows=8)
        [elastic] = elastics(mesh)
        stats = elastic.stats
        assert stats.waits == stats.starts["demand"] == elastic.residents
        assert stats.starts["warm"] + stats.starts["cold"] == stats.starts["demand"]
        assert stats.stops == 0


def test_an_expert_that_cannot_be_started_is_refused_and_named():
    options: dict[str, Any] = {"deadline": 5.0, "give_up": 0.5}
    broken = elastic_with(4, broken=lambda layer, expert: expert == 2)
    with toy_mesh(everywhere(1), make_elastic=broken, **options) as mesh:
        with pytest.raises(ExchangeUnavailable, match=r"expert 2 of layer 1 cannot be started: .*corrupt"):
            for seed in range(20):
                mesh.check(seed, LAYERS[0], rows=8)
        [elastic] = elastics(mesh)
        assert elastic.stats.failed >= 1


def test_whatever_a_start_fails_of_is_told_and_others_go_on():
    """Also what nobody has thought of: the thread of starts lives on."""
    broken = elastic_with(2 * EXPERTS, broken=lambda layer, expert: layer == LAYERS[0] and 1 // 0 > 0)
    with (
        toy_mesh(everywhere(1), make_elastic=broken, deadline=5.0, give_up=0.5) as mesh,
        pytest.raises(ExchangeUnavailable, match=r"layer 1 cannot be started: .*zero"),
    ):
        for seed in range(20):
            mesh.check(seed, LAYERS[0], rows=8)
    with toy_mesh(everywhere(1), make_elastic=broken, **PATIENT) as mesh:
        mesh.check(1, LAYERS[1], rows=8)


def test_an_expert_that_cannot_be_started_is_not_foreseen_again_and_again():
    bad = elastic_with(2 * EXPERTS, predictor=Oracle(), broken=lambda layer, expert: layer == LAYERS[1] and expert == 2)
    with toy_mesh(everywhere(1), make_elastic=bad, **PATIENT) as mesh:
        [elastic] = elastics(mesh)
        for seed in range(2000):
            mesh.check(seed, LAYERS[0], rows=8)
            if elastic.stats.failed and seed > 20:
                break
        assert elastic.stats.failed == 1
        assert elastic.facts().broken == ((LAYERS[1], 2),)


def test_other_homes_serve_an_expert_that_cannot_be_started_here():
    calls = iter(range(10**6))
    only_first = elastic_with(2 * EXPERTS, broken=lambda layer, expert: expert == 2 and next(calls) < 1)
    with toy_mesh(everywhere(2), make_elastic=only_first, deadline=5.0, give_up=30.0) as mesh:
        for seed in range(10):
            mesh.check(seed, LAYERS[0], rows=8)
        assert sum(elastic.stats.failed for elastic in elastics(mesh)) == 1


def test_a_repeat_takes_the_place_of_the_attempt_that_waits():
    """The deadline is far shorter than starting one expert after the other takes: it is repeated again and again."""
    with toy_mesh(everywhere(1), make_elastic=elastic_with(1), deadline=0.001, give_up=60.0) as mesh:
        for seed in range(5):
            mesh.check(seed, LAYERS[seed % 2], rows=16)
        mesh.instances[0].server.detach([]).result(60)
        waiting = mesh.instances[0].server._waiting
        assert waiting is not None
        assert len(waiting._questions) <= 1


def test_homes_that_are_taken_away_are_stopped():
    with toy_mesh(everywhere(1), make_elastic=elastic_with(2 * EXPERTS), **PATIENT) as mesh:
        for seed in range(10):
            mesh.check(seed, LAYERS[0], rows=8)
        mesh.instances[0].server.house({LAYERS[0]: frozenset({1, 3})}).result(60)
        [elastic] = elastics(mesh)
        assert elastic.residents == 2
        mesh.check(99, LAYERS[0], rows=8)


def test_idle_experts_are_stopped_and_come_back(monkeypatch):
    with toy_mesh(everywhere(1), make_elastic=elastic_with(2 * EXPERTS, keep_alive=1e-9), **PATIENT) as mesh:
        mesh.check(1, LAYERS[0], rows=8)
        [elastic] = elastics(mesh)
        monkeypatch.setattr("services.experts.elastic.LOOK_S", 0.0)
        elastic._look_at = 0.0
        for _ in range(2000):
            mesh.instances[0].server.detach([]).result(60)
            if elastic.residents == 0:
                break
        assert elastic.residents == 0
        cost = elastic.facts().cost
        assert cost.proxy > 0
        assert 0 < cost.resident < cost.provisioned
        mesh.check(2, LAYERS[0], rows=8)


class Oracle:
    """Knows what the toy gate of the next layer would choose for these very rows."""

    pairs = frozenset({(LAYERS[0], 1)})
    nbytes = 0

    def __init__(self) -> None:
        self.asked = 0
        self.load = 5.0

    def observe(self, layer: int, ids: np.ndarray) -> None:
        assert ids.shape[1] == TOP_K

    def scores(self, layer: int, distance: int, rows: np.ndarray, ids: np.ndarray) -> np.ndarray:
        raise NotImplementedError

    def loads(self, layer: int, distance: int, rows: np.ndarray, ids: np.ndarray) -> np.ndarray:
        self.asked += 1
        return np.full(EXPERTS, self.load, np.float32)


def test_what_is_foreseen_is_there_when_it_is_called():
    oracle: Predictor = Oracle()
    with toy_mesh(everywhere(1), make_elastic=elastic_with(2 * EXPERTS, predictor=oracle), **PATIENT) as mesh:
        mesh.check(1, LAYERS[0], rows=8)
        [elastic] = elastics(mesh)
        for _ in range(2000):  # until its thread has started them all
            mesh.instances[0].server.detach([]).result(60)
            starts = elastic.stats.starts
            if starts["predicted"] and starts["warm"] + starts["cold"] == starts["predicted"] + starts["demand"]:
                break
        before = elastic.stats.waits
        mesh.check(2, LAYERS[1], rows=8)
        assert elastic.stats.starts["predicted"] == EXPERTS
        assert elastic.stats.waits == before


def test_what_has_been_started_by_the_time_a_frame_comes_is_there_though_nobody_was_woken():
    oracle = Oracle()
    with toy_mesh(everywhere(1), make_elastic=elastic_with(2 * EXPERTS, predictor=oracle), **PATIENT) as mesh:
        [elastic] = elastics(mesh)
        oracle.load = 0.0
        mesh.check(1, LAYERS[0], rows=8)
        mesh.instances[0].server.detach([]).result(60)  # it has looked ahead
        oracle.load, elastic._starts._wake = 5.0, lambda: None
        mesh.check(1, LAYERS[0], rows=8)
        ended, starts, deadline = elastic._starts._ended, elastic.stats.starts, time.monotonic() + 60
        while len(ended) + starts["warm"] + starts["cold"] < EXPERTS + starts["demand"]:
            assert time.monotonic() < deadline
            time.sleep(0.001)
        before = elastic.stats.waits
        mesh.check(2, LAYERS[1], rows=8)
        assert elastic.stats.starts["predicted"] == EXPERTS
        assert elastic.stats.waits == before


def test_what_is_foreseen_for_steps_with_prompts_is_told_apart():
    oracle: Predictor = Oracle()
    with toy_mesh(everywhere(1), make_elastic=elastic_with(2 * EXPERTS, predictor=oracle), **PATIENT) as mesh:
        for prefill in (False, True, False):
            mesh.exchange.begin(8, prefill)
            mesh.check(1, LAYERS[0], rows=8)
            mesh.exchange.end()
        mesh.instances[0].server.detach([]).result(60)
        [load] = elastics(mesh)[0].foreseen.take()
        assert (load.exchanges, load.prefill_exchanges) == (3, 1)
        assert load.prefill_sums[0].tolist() == [5.0] * EXPERTS


@pytest.mark.parametrize("seed", range(5))
def test_lost_and_doubled_frames_do_no_harm(seed):
    rates = Rates(drop=0.1, duplicate=0.2, delay=0.2, reorder=0.2)
    network = MemoryNetwork(Faults(seed, {FrameKind.DISPATCH: rates, FrameKind.COMBINE: rates}, longest=0.01))
    with toy_mesh(round_robin(2), network, make_elastic=elastic_with(2), deadline=0.05, give_up=60.0) as mesh:
        for step in range(10):
            mesh.check(step, LAYERS[step % 2], rows=6)
