"""The elastic pool of a replay: queues of starts, who makes room, and what pauses cost, worked out by hand."""

import numpy as np
import pytest

from shared.elastic.residency import Residency
from shared.replay.pool import ABSENT, Pool, make_room, release, start, start_now, stop, victim
from shared.replay.upkeep import fill, idle, move_homes

LAYERS, EXPERTS = 3, 4
TIMES = (0.5, 1.0, 10.0, 0.0)
"""Between layers, of a warm start, of a cold one."""
NOBODY = np.zeros(EXPERTS, np.int64)


def pool(instances: int = 1, budget: int = 12, resident: bool = False) -> Pool:
    """Every expert's home is instance e mod instances; all have been started before."""
    homes = np.zeros((LAYERS, instances, EXPERTS), np.bool_)
    homes[:, np.arange(EXPERTS) % instances, np.arange(EXPERTS)] = True
    ready = np.where(homes & resident, 0.0, ABSENT)
    held = np.isfinite(ready)
    return Pool(
        homes, ready, held.sum(axis=1), np.zeros(instances), held.sum(axis=(0, 2)), np.full(instances, budget),
        np.ones((LAYERS, EXPERTS)), np.zeros(2, np.int64), np.ones((LAYERS, EXPERTS), np.bool_),
    )  # fmt: skip


def residents(of: Pool, g: int = 0) -> set[tuple[int, int]]:
    return {(int(layer), int(e)) for layer, e in np.argwhere(of.ready[:, g] < ABSENT)}


def test_starts_are_made_one_after_the_other_and_the_urgent_one_before_those_in_line() -> None:
    made = pool()
    for e in range(3):
        start(5.0, 1, 0, e, made, TIMES)
    assert made.ready[1, 0].tolist() == [6, 7, 8, ABSENT]
    start_now(5.5, 0, 0, 3, NOBODY, made, TIMES)
    assert made.ready[0, 0, 3] == 7, "after the one under way"
    assert made.ready[1, 0].tolist() == [6, 8, 9, ABSENT]
    assert made.free[0] == 9
    assert (made.held[0], made.starts.tolist()) == (4, [4, 0])


def test_the_first_start_of_an_expert_is_a_cold_one() -> None:
    made = pool()
    made.loaded[2, 1] = False
    start(0.0, 2, 0, 1, made, TIMES)
    stop(2, 0, 1, made)
    start(20.0, 2, 0, 1, made, TIMES)
    assert made.ready[2, 0, 1] == 21
    assert made.starts.tolist() == [1, 1]


def test_a_replica_that_another_instance_has_too_makes_room_first_then_what_is_called_least() -> None:
    made = pool(2, resident=True)
    made.share[2, 0] = 0.2
    assert victim(0, 0, 0, NOBODY, made) == (2, 0)
    start(0.0, 1, 0, 1, made, TIMES)
    assert victim(0, 0, 0, NOBODY, made) == (1, 1), "at home on the other instance"
    assert victim(0, 0, 1, NOBODY, made) == (2, 0), "layers until 1 are spared"


def test_of_equals_the_layer_that_comes_last_makes_room() -> None:
    made = pool(resident=True)
    assert victim(1, 0, 1, NOBODY, made)[0] == 0
    assert victim(2, 0, 2, NOBODY, made)[0] == 1


def test_room_is_made_only_at_the_cost_of_what_is_worth_less_and_comes_later() -> None:
    made = pool(budget=12, resident=True)
    assert not make_room(0, 1, 0, 0.5, NOBODY, made), "all are called in every step"
    assert make_room(0, 1, 0, ABSENT, NOBODY, made)
    assert made.held[0] == 11
    assert make_room(0, 1, 0, 0.0, NOBODY, made), "there is room now"
    full = pool(budget=12, resident=True)
    assert not make_room(0, 2, 0, ABSENT, NOBODY, full), "every other layer is needed before"


@pytest.mark.parametrize("seed", range(20))
def test_the_live_mesh_would_stop_the_same_expert(seed: int) -> None:
    """Of the layer that comes last; layers in between count for it in a replay only."""
    made, rng = pool(resident=True), np.random.default_rng(seed)
    made.share[:] = 1.0
    made.share[2] = rng.permutation(EXPERTS) / (2 * EXPERTS)
    live = Residency(LAYERS, EXPERTS, LAYERS * EXPERTS)
    live.adopt(np.ones((LAYERS, EXPERTS), np.bool_))
    for layer, e in np.ndindex(LAYERS, EXPERTS):
        live.loaded(layer, e, 0.0)
    live._share[:] = made.share
    live.gone(0, 0)
    live.state[0, 1:] = 0
    stop(0, 0, 0, made)
    (((layer, e), _),) = live._victims(1)
    assert victim(0, 0, 0, NOBODY, made) == (layer, e)


def test_after_an_exchange_replicas_away_from_home_go_and_so_do_experts_that_are_rarely_called() -> None:
    made = pool(2, resident=True)
    start(0.0, 1, 0, 1, made, TIMES)
    made.share[1, 3] = 0.05
    release(5.0, 1, 0.1, made)
    assert residents(made, 0) == {(layer, e) for layer in range(LAYERS) for e in (0, 2)}
    assert (1, 3) not in residents(made, 1)
    stop(1, 1, 1, made)
    start(0.0, 1, 0, 1, made, TIMES)
    release(5.0, 1, 0.0, made)
    assert (1, 1) in residents(made, 0), "nobody else has it"
    start(4.5, 1, 1, 1, made, TIMES)
    release(5.0, 1, 0.0, made)
    assert (1, 1) in residents(made, 0), "its home is being started"
    release(6.0, 1, 0.0, made)
    assert (1, 1) not in residents(made, 0)


def test_free_memory_takes_what_is_called_often_enough() -> None:
    made = pool(budget=5)
    made.share[0] = [0.1, 0.9, 0.9, 0.1]
    fill(0.0, 0.5, made, TIMES)
    assert residents(made) == {(0, 1), (0, 2), (1, 0), (1, 1), (1, 2)}


def test_new_homes_are_started_and_old_ones_go() -> None:
    made = pool(2, resident=True)
    homes = made.homes[:, ::-1].copy()
    move_homes(0.0, homes, made, TIMES)
    assert np.isfinite(made.ready[homes]).all()
    assert np.isfinite(made.ready[~homes]).all(), "old ones compute until the new ones can"
    for layer in range(LAYERS):
        release(100.0, layer, 0.0, made)
    assert (np.isfinite(made.ready) == homes).all()
    assert made.starts.sum() == LAYERS * EXPERTS


def test_a_pause_stops_and_starts_as_the_keep_alive_says_and_adds_up_what_is_held() -> None:
    made = pool(resident=True)
    stops, never = np.full((LAYERS, EXPERTS), 30.0), np.full((LAYERS, EXPERTS), np.inf)
    stops[0, 0], stops[1, 1] = 12.0, 5.0
    warm, last = never.copy(), never.copy()
    warm[0, 0], last[0, 0] = 15.0, 18.0
    held = idle(10.0, 20.0, stops, warm, last, made, TIMES)
    assert held == pytest.approx(10 * 10 + 2 + 0 + 3), "ten stay; one until 12, and again from 15 to 18"
    assert made.held[0] == 10
