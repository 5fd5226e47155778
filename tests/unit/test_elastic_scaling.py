"""How many replicas experts get: the paper's algorithm with numbers worked out by hand, and ours where it is better."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shared.elastic.scaling import Rules, moemesh, paper, rows_within

FREE = 1e12
"""A memory cap that never matters."""
LOADS = st.lists(st.integers(0, 500), min_size=2, max_size=24).map(lambda loads: np.array(loads, np.float64))


def zipf(experts: int) -> np.ndarray:
    return 1.0 / np.arange(1, experts + 1)


def cv(loads: np.ndarray, counts: np.ndarray) -> float:
    replicas = np.repeat(loads / counts, counts)
    return replicas.std() / replicas.mean()


@pytest.mark.parametrize(("experts", "extra"), [(8, 6), (16, 15), (64, 98)])
def test_the_papers_algorithm_adds_what_was_computed_by_hand_for_zipfs_law(experts: int, extra: int) -> None:
    counts = paper(zipf(experts), FREE, 1)
    assert counts.sum() - experts == extra
    assert cv(zipf(experts), counts) <= 0.2


def test_the_papers_algorithm_shreds_equal_experts_because_others_are_idle() -> None:
    assert paper(np.array([1.0] * 7 + [0.0]), FREE, 1).sum() - 8 == 21
    assert paper(np.array([1.0] * 8 + [0.0] * 8), FREE, 1).sum() - 16 == 192


def test_the_paper_looks_at_its_memory_before_it_adds_a_replica() -> None:
    assert paper(zipf(8), cap_bytes=0, expert_bytes=10).sum() == 8
    assert paper(zipf(8), cap_bytes=25, expert_bytes=10).sum() == 8 + 3, "the third exceeds it"


def test_without_load_nobody_adds_a_replica() -> None:
    nothing = np.zeros(8)
    assert paper(nothing, FREE, 1).tolist() == [1] * 8
    assert moemesh(nothing, np.full(8, 3), Rules(64, 8)).tolist() == [1] * 8


def test_idle_experts_are_no_imbalance_for_ours() -> None:
    rules = Rules(slots=1000, instances=8)
    assert moemesh(np.array([1.0] * 7 + [0.0]), np.ones(8), rules).sum() == 8
    assert moemesh(np.array([1.0] * 8 + [0.0] * 8), np.ones(16), rules).sum() == 16
    assert moemesh(np.array([9.0] + [1.0] * 7 + [0.0] * 8), np.ones(16), rules)[0] > 1


@settings(max_examples=200, deadline=None)
@given(LOADS, st.integers(1, 12), st.integers(0, 40), st.floats(0, 1), st.floats(0, 50))
def test_the_memory_cap_and_one_replica_per_instance_hold(
    loads: np.ndarray, instances: int, spare: int, threshold: float, replica_rows: float
) -> None:
    rules = Rules(len(loads) + spare, instances, threshold, replica_rows)
    counts = moemesh(loads, np.full(len(loads), 3), rules)
    assert counts.min() == 1 if spare == 0 else counts.min() >= 1
    assert counts.max() <= instances
    assert counts.sum() <= rules.slots
    assert (counts[loads == 0] == 1).all(), "an idle expert needs no second replica"


def test_a_replica_that_costs_more_than_it_relieves_is_not_added() -> None:
    small, rules = np.array([4.0, 1.0, 1.0, 0.0]), Rules(slots=8, instances=4, replica_rows=10)
    assert moemesh(small, np.ones(4), rules).tolist() == [1, 1, 1, 1], "2 rows fewer, 10 rows more"
    assert moemesh(100 * small, np.ones(4), rules)[0] > 1


def test_the_target_time_decides_instead_of_the_threshold() -> None:
    loads, rules = np.array([60.0, 20.0, 10.0]), Rules(slots=20, instances=8, threshold=0.0)
    assert moemesh(loads, np.ones(3), replace(rules, target_rows=20)).tolist() == [3, 1, 1]
    assert moemesh(loads, np.ones(3), replace(rules, target_rows=60)).tolist() == [1, 1, 1]
    assert rows_within(5e-3, row_s=1e-4, replica_s=3e-3) == pytest.approx(20)
    assert rows_within(1e-3, row_s=1e-4, replica_s=3e-3) == 1, "a target that nothing can meet"


def test_counts_do_not_flicker_with_loads_near_the_threshold() -> None:
    rules = Rules(slots=12, instances=4, target_rows=50, slack=0.2)
    two = moemesh(np.array([51.0, 20, 20, 20]), np.ones(4), rules)
    assert two.tolist() == [2, 1, 1, 1]
    assert moemesh(np.array([49.0, 20, 20, 20]), two, rules).tolist() == [2, 1, 1, 1], "kept: it may well be back"
    assert moemesh(np.array([21.0, 40, 20, 20]), two, rules).tolist() == [1, 1, 1, 1]


def test_loads_that_are_no_loads_are_refused() -> None:
    with pytest.raises(ValueError, match="negative or not a finite number"):
        paper(np.array([1.0, np.nan]), 1, 1)
    with pytest.raises(ValueError, match="3 slots cannot hold 4 experts"):
        moemesh(np.ones(4), np.ones(4), Rules(slots=3, instances=2))
