"""Which experts are resident: what is needed last makes room, predictions go before habits, the budget always holds."""

import numpy as np
import pytest

from shared.elastic.eviction import Eviction
from shared.elastic.residency import Residence, Residency

LAYERS, EXPERTS = 3, 8


def made(slots: int, eviction: Eviction = Eviction.FORESEEN) -> Residency:
    residency = Residency(LAYERS, EXPERTS, slots, eviction)
    residency.adopt(np.ones((LAYERS, EXPERTS), np.bool_))
    return residency


def call(residency: Residency, layer: int, experts: list[int], now: float = 0.0) -> int:
    """An exchange, whose missing experts are started and end at once. Returns how many it waited for."""
    ids = np.array(experts)
    missing = residency.missing(layer, ids)
    residency.call(layer, ids, now)
    for start in residency.demand(layer, ids):
        residency.loaded(start.layer, start.expert, now)
    return len(missing)


def residents(residency: Residency) -> set[tuple[int, int]]:
    return {(int(layer), int(e)) for layer, e in np.argwhere(residency.state == Residence.RESIDENT)}


@pytest.mark.parametrize("eviction", list(Eviction))
@pytest.mark.parametrize("seed", range(20))
def test_never_more_experts_than_slots_and_everything_demanded_comes_in_the_end(seed, eviction):
    rng = np.random.default_rng(seed)
    slots = int(rng.integers(2, 12))
    residency, loading = made(slots, eviction), []
    for step in range(200):
        layer = step % LAYERS
        todo = set(rng.choice(EXPERTS, rng.integers(1, EXPERTS), replace=False).tolist())
        residency.call(layer, np.array(sorted(todo)), float(step))
        while todo:
            todo -= {e for at, e in residents(residency) if at == layer}
            loading += residency.demand(layer, np.array(sorted(todo), np.int64))
            assert np.count_nonzero(residency.state) <= slots
            assert loading or not todo, "it waits for nothing"
            for start in loading:
                residency.loaded(start.layer, start.expert, float(step))
            loading = []
        soon = (layer + 1) % LAYERS
        loading = residency.predict(soon, rng.random(EXPERTS).astype(np.float32))
        assert np.count_nonzero(residency.state) <= slots


def test_what_is_called_rarely_makes_room_for_what_is_called_often():
    residency = made(slots=4)
    for step in range(60):
        for layer in range(LAYERS):
            call(residency, layer, [0], step)
    assert {(layer, 0) for layer in range(LAYERS)} <= residents(residency)
    assert call(residency, 1, [0, 5], 61.0) == 1
    assert call(residency, 2, [0, 6], 61.0) == 1
    assert {(layer, 0) for layer in range(LAYERS)} <= residents(residency), "a newcomer took an old hand's slot"


def test_least_recently_used_lets_go_of_what_was_called_longest_ago():
    residency = made(3, Eviction.LRU)
    for now, expert in enumerate([0, 1, 2, 0, 3]):
        call(residency, 0, [expert], float(now))
    assert residents(residency) == {(0, 0), (0, 2), (0, 3)}
    assert residency.predict(1, np.full(EXPERTS, 5.0, np.float32)) == []


def test_a_prediction_starts_the_most_probable_experts_that_have_a_home_here():
    residency = made(slots=3)
    homes = np.ones((LAYERS, EXPERTS), np.bool_)
    homes[1, 7] = False
    residency.adopt(homes)
    loads = np.array([0, 0.01, 3, 0, 1, 0, 0.5, 9], np.float32)
    assert [start.expert for start in residency.predict(1, loads)] == [2, 4, 6]
    assert residency.free == 0


def test_a_prediction_evicts_nobody_who_is_needed_sooner():
    residency = made(slots=2)
    for step in range(20):
        call(residency, 0, [0], step)
        call(residency, 1, [1], step)
    assert residency.predict(2, np.array([0] * 6 + [0.4, 0], np.float32)) == []
    assert len(residency.predict(2, np.array([0] * 6 + [50, 0], np.float32))) == 1, "a certain call comes first"


def test_a_prediction_counts_for_one_exchange_of_its_layer():
    residency = made(slots=24)
    before = residency.worth()[1, 3]
    residency.predict(1, np.array([0, 0, 0, 4, 0, 0, 0, 0], np.float32))
    assert residency.worth()[1, 3] > before
    call(residency, 1, [0])
    assert residency.worth()[1, 3] == before


def test_residents_without_a_home_are_named_and_those_that_load_are_not():
    residency = made(slots=4)
    call(residency, 0, [1, 2])
    residency.demand(0, np.array([3]))
    homes = np.ones((LAYERS, EXPERTS), np.bool_)
    homes[0, [2, 3]] = False
    assert residency.adopt(homes) == [(0, 2)]


def test_idle_residents_are_those_that_were_not_called_since():
    residency = made(slots=4)
    call(residency, 0, [1], now=10.0)
    call(residency, 2, [4], now=20.0)
    nobody = np.zeros((LAYERS, EXPERTS), np.bool_)
    assert residency.idle(nobody, 15.0) == [(0, 1)]
    wanted = nobody.copy()
    wanted[0, 1] = True
    assert residency.idle(wanted, 15.0) == []


def test_what_is_wanted_again_is_started_on_free_slots_only():
    residency = made(slots=3)
    call(residency, 0, [1, 2], now=1.0)
    wanted = np.zeros((LAYERS, EXPERTS), np.bool_)
    wanted[0, 1] = wanted[1, 5] = wanted[2, 3] = True
    residency.call(2, np.array([3]), 2.0)
    assert [(start.layer, start.expert) for start in residency.revive(wanted)] == [(2, 3)], "the more habitual one"
    assert residency.free == 0
