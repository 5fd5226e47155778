"""Layer times in every form, by hand, and no policy faster than perfect balance."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shared.replay.timing import Costs, Form, balanced_time, costs, even_time
from shared.replay.timing import divided_time as divided
from tests.unit.replay_cases import inputs

DEVICES, PAPERS = (1.0, 10.0, 0.25, False), (1.0, 0.0, 0.25, True)
NO_WAIT = np.zeros(2)


def divided_time(loads: np.ndarray, usable: np.ndarray, waits: np.ndarray, numbers: Costs) -> float:
    """Everybody is at home where it is."""
    return divided(loads, usable, usable > 0, waits, numbers)


def test_the_forms_differ_in_what_they_add_up() -> None:
    loads, held = np.array([6, 4, 0]), np.array([[1, 1, 0], [0, 0, 1]])
    assert even_time(loads, held, NO_WAIT, DEVICES) == 2 * 10 + 10 + 2 * 0.25 * 10
    assert even_time(loads, held, NO_WAIT, (1.0, 0.0, 0.25, False)) == 10 + 2 * 0.25 * 10
    assert even_time(loads, held, NO_WAIT, PAPERS) == 6 + 2 * 0.25 * 10, "replicas beside each other"


def test_rows_are_whole_and_a_replica_without_rows_reads_nothing() -> None:
    held = np.array([[1], [1]])
    assert even_time(np.array([1]), held, NO_WAIT, DEVICES) == 10 + 1 + 0.5
    assert even_time(np.array([5]), held, NO_WAIT, DEVICES) == 10 + 3 + 2 * 0.25 * 3


def test_an_expert_is_split_when_that_pays_and_moves_as_a_whole_when_not() -> None:
    both = np.array([[1, 1], [1, 1]])
    assert divided_time(np.array([3, 3]), both, NO_WAIT, DEVICES) == 10 + 3 + 2 * 0.25 * 3
    assert divided_time(np.array([100, 0]), both, NO_WAIT, DEVICES) == 10 + 50 + 2 * 0.25 * 50
    assert divided_time(np.array([4, 0]), both, NO_WAIT, DEVICES) == pytest.approx(10 + 2 + 2 * 0.25 * 2)


def test_experts_change_places_where_no_single_move_helps() -> None:
    loads, anywhere = np.array([10, 8, 6, 3, 3]), np.ones((2, 5), np.int64)
    home = np.array([[True, True, False, False, False], [False, False, True, True, True]])
    numbers = (1.0, 100.0, 0.0, False)
    assert divided(loads, anywhere, home, NO_WAIT, numbers) == 300 + 6 + 3 + 3
    assert divided(loads[:4], anywhere[:, :4], home[:, :4], NO_WAIT, numbers) == 200 + 14


def test_the_wait_of_an_instance_comes_before_its_computation() -> None:
    held = np.array([[1, 0], [0, 1]])
    assert even_time(np.array([2, 2]), held, np.array([5.0, 0.0]), DEVICES) == 5 + 10 + 2 + 1


@settings(max_examples=200, deadline=None)
@given(st.integers(1, 8), st.integers(1, 16), st.integers(0, 2**32 - 1), st.sampled_from([Form.DEVICES, Form.SUMS]))
def test_perfect_balance_is_never_slower(instances: int, experts: int, seed: int, form: Form) -> None:
    rng, numbers = np.random.default_rng(seed), costs(inputs(), form)
    loads = rng.integers(0, 60, experts) * rng.integers(0, 2, experts)
    held = (rng.random((instances, experts)) < 0.4).astype(np.int64)
    held[rng.integers(0, instances, experts), np.arange(experts)] = 1
    least, none = balanced_time(loads, instances, numbers), np.zeros(instances)
    even, divided = even_time(loads, held, none, numbers), divided_time(loads, held, none, numbers)
    assert least <= divided * (1 + 1e-9)
    assert divided <= even * (1 + 1e-9)
