"""Where replicas go: the paper's algorithm with its defects, and ours with the properties that it promises."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shared.elastic.placing import moemesh, paper


def busiest(loads: np.ndarray, counts: np.ndarray, held: np.ndarray) -> float:
    return float((held * (loads / counts)).sum(axis=1).max())


def test_the_papers_algorithm_fills_the_shortest_queue_with_the_most_loaded_replica() -> None:
    held = paper(np.array([5.0, 4, 3, 3]), np.ones(4), np.zeros((2, 4)))
    assert held.tolist() == [[1, 0, 0, 1], [0, 1, 1, 0]]


def test_the_papers_algorithm_uses_warm_replicas_whatever_that_costs() -> None:
    loads, last = np.array([5.0, 4, 3, 3]), np.array([[1, 1, 1, 1], [0, 0, 0, 0]])
    assert paper(loads, np.ones(4), last).tolist() == last.tolist()
    assert busiest(loads, np.ones(4), moemesh(loads, np.ones(4), [4, 4], last, price=0)) == 8


def test_the_papers_algorithm_may_put_two_replicas_of_an_expert_on_one_instance() -> None:
    held = paper(np.array([8.0, 9.0]), np.array([4, 1]), np.zeros((2, 2)))
    assert held[:, 0].max() > 1
    assert moemesh(np.array([8.0, 9.0]), np.array([2, 1]), [2, 2], np.zeros((2, 2)))[:, 0].all()


CASES = st.tuples(st.integers(1, 9), st.integers(2, 20), st.integers(0, 2**32 - 1))


@settings(max_examples=200, deadline=None)
@given(CASES, st.integers(0, 6), st.floats(0, 0.2))
def test_capacity_and_anti_affinity_hold_and_every_replica_has_its_place(
    case: tuple[int, int, int], spare: int, price: float
) -> None:
    instances, experts, seed = case
    rng = np.random.default_rng(seed)
    counts = rng.integers(1, instances + 1, experts)
    slots = np.full(instances, -(-counts.sum() // instances) + spare)
    loads, warm = rng.integers(0, 99, (4, experts)), rng.random((instances, experts)) < 0.4
    homes = moemesh(loads, counts, slots, warm, replica_rows=3, price=price)
    assert (homes.sum(axis=0) == counts).all()
    assert (homes.sum(axis=1) <= slots).all()
    again = moemesh(loads, counts, slots, warm, replica_rows=3, price=price)
    assert (homes == again).all(), "deterministic"


def test_what_is_warm_stays_unless_moving_it_gains_enough() -> None:
    loads, warm = np.array([10.0, 9, 1, 1]), np.array([[True, False, True, False], [False, True, False, True]])
    assert (moemesh(loads, np.ones(4), [3, 3], warm) == warm).all()
    piled = np.array([[True, True, False, False], [False, False, True, True]])
    moved = moemesh(loads, np.ones(4), [3, 3], piled)
    assert busiest(loads, np.ones(4), moved) == 11
    assert (moemesh(loads, np.ones(4), [3, 3], piled, price=1.0) == piled).all(), "too dear to start"


def test_experts_of_the_same_exchanges_are_taken_apart_although_their_means_are_alike() -> None:
    exchanges = np.array([[10, 10, 0, 0], [0, 0, 10, 10]])
    homes = moemesh(exchanges, np.ones(4), [2, 2], np.zeros((2, 4)))
    assert (exchanges @ homes.T).max() == 10


def test_an_instance_that_loses_slots_or_a_home_that_is_gone_is_repaired() -> None:
    warm = np.array([[True, True, True, False], [False, False, False, False]])
    homes = moemesh(np.array([4.0, 3, 2, 1]), np.ones(4), [2, 2], warm)
    assert (homes.sum(axis=1) == 2).all()
    assert (homes.sum(axis=0) == 1).all()


def test_replicas_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match="5 replicas do not fit into 2 instances"):
        moemesh(np.ones(4), np.array([2, 1, 1, 1]), [2, 2], np.zeros((2, 4)))
    with pytest.raises(ValueError, match="2 replicas of one expert do not fit"):
        moemesh(np.ones(2), np.array([2, 1]), [3, 0], np.zeros((2, 2)))
