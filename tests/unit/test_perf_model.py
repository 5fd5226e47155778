"""The performance model: the paper's formulas, what hides what, and the shape that the search relies on."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from shared import device_profile
from shared.device_profile import BUILT_IN, DeviceProfile
from shared.perf_model import (
    Costs,
    Load,
    Times,
    attention_seconds,
    experts_seconds,
    first_token_seconds,
    head_seconds,
    in_turn,
    ping_pong,
    shared_seconds,
    step,
)

PROFILE = BUILT_IN["synthetic-10ms"]
COSTS = Costs(PROFILE, PROFILE, layers=3, moe_layers=2, prefill_position_s=0.1e-6, dense_s=2e-3, dense_row_s=1e-5)


def arrays(*values: float) -> np.ndarray:
    return np.array(values, np.float64)


def load(decode: float, prefill: float = 0.0, context: float = 100.0) -> Load:
    return Load(arrays(decode), arrays(prefill), context, 50.0)


@given(st.integers(1, 500), st.integers(0, 10_000), st.integers(1, 64))
def test_one_instance_takes_the_times_that_paced_instances_keep(rows: int, context: int, activated: int) -> None:
    alone = arrays(1)
    attention = attention_seconds(COSTS, load(rows, context=context), alone)[0]
    assert attention == pytest.approx(device_profile.attention_seconds(PROFILE, rows, context))
    experts = experts_seconds(COSTS, arrays(activated), arrays(rows), alone)[0]
    assert experts == pytest.approx(device_profile.experts_seconds(PROFILE, activated))
    assert shared_seconds(COSTS, arrays(rows))[0] == pytest.approx(device_profile.shared_seconds(PROFILE, rows))
    assert head_seconds(COSTS, arrays(rows))[0] == pytest.approx(device_profile.head_seconds(PROFILE, rows))


def test_rows_of_prompts_read_the_cache_at_their_own_rate() -> None:
    decode = 8 * (0.1e-3 + 0.5e-6 * 10_000)
    prompts = 2 * (0.1e-3 + 0.1e-6 * 50)
    both = attention_seconds(COSTS, load(8, prefill=2, context=10_000), arrays(1))
    assert both == pytest.approx(decode + prompts)


def test_rows_are_divided_among_attention_instances_but_none_has_less_than_one() -> None:
    seconds = attention_seconds(COSTS, Load(arrays(64, 64, 2), arrays(0, 0, 0), 10_000, 0), arrays(1, 4, 4))
    assert seconds[0] == pytest.approx(4 * seconds[1])
    assert seconds[2] == pytest.approx(0.1e-3 + 0.5e-6 * 10_000)


def test_a_step_is_the_sum_of_its_layers_with_shared_experts_hidden() -> None:
    parts = Times(arrays(4e-3), arrays(1e-3), np.array([[5e-3], [7e-3]]), arrays(2e-3))
    done = step(COSTS, load(1), arrays(1), parts, arrays(1, 1))
    dense = 4e-3 + 2e-3
    assert done.seconds == pytest.approx((4 + 2 + 5) * 1e-3 + (4 + 2 + 7) * 1e-3 + dense + done.head)
    assert done.head == pytest.approx(2e-3 + 10e-6)
    assert done.experts == pytest.approx(12e-3)
    assert done.shared == pytest.approx(2e-3)
    assert done.attention == pytest.approx(2 * 4e-3 + dense)


def test_a_layer_of_a_table_counts_as_often_as_it_stands_for() -> None:
    parts = Times(arrays(1e-3), arrays(0), np.array([[5e-3]]), arrays(0))
    once, twice = (step(COSTS, load(1), arrays(1), parts, arrays(n)).seconds for n in (1, 2))
    assert twice - once == pytest.approx(6e-3)


def test_shared_experts_that_outlast_the_exchange_are_waited_for() -> None:
    assert in_turn(Times(arrays(1), arrays(9), np.array([[2.0]]), arrays(3)))[0] == 10


@pytest.mark.parametrize(
    ("half", "seconds"),
    [
        (Times(arrays(5), arrays(1), np.array([[2.0]]), arrays(1)), 12),  # attention has no pause
        (Times(arrays(2), arrays(1), np.array([[6.0]]), arrays(1)), 12),  # experts have none
        (Times(arrays(2), arrays(0), np.array([[2.0]]), arrays(9)), 13),  # one micro-batch's own way round
    ],
)
def test_the_busiest_sets_the_pace_of_micro_batches(half: Times, seconds: float) -> None:
    assert ping_pong(half)[0] == seconds


def test_micro_batches_hide_what_is_linear_in_rows() -> None:
    whole, half = (Times(arrays(4 * f), arrays(0), np.array([[4.0 * f]]), arrays(1 * f)) for f in (1, 0.5))
    assert ping_pong(half)[0] == pytest.approx(4.5)
    assert in_turn(whole)[0] == pytest.approx(9)


def test_experts_that_compute_longer_than_they_read_are_bound_by_their_rows() -> None:
    costs = Costs(DeviceProfile("a"), DeviceProfile("e", experts_s=1.0, expert_s=2.0), 1, 1, 0.0, expert_row_s=0.5)
    assert experts_seconds(costs, arrays(3, 3), arrays(4, 40), arrays(1, 1)).tolist() == [7.0, 21.0]


def test_on_a_shared_host_rows_cost_on_top_of_reading_which_depends_on_the_instances() -> None:
    experts = DeviceProfile("e", experts_s=1.0)
    costs = Costs(DeviceProfile("a"), experts, 1, 1, 0.0, part_s=0.5, reading=((1, 2), (3, 4)))
    several = arrays(1, 2, 3, 9)
    assert experts_seconds(costs, arrays(1, 1, 1, 1), arrays(2, 2, 2, 2), several).tolist() == [4.0, 5.0, 6.0, 6.0]


def test_attention_instances_of_a_host_cost_each_other_time_in_every_step() -> None:
    profile = DeviceProfile("a", head_s=1.0)
    costs = Costs(profile, DeviceProfile("e"), 1, 1, 0.0, member_s=0.5, token_s=0.25)
    none = Times(arrays(0, 0), arrays(0, 0), np.zeros((1, 2)), arrays(0, 0))
    load_of_four = Load(arrays(4, 4), arrays(0, 0), 0.0, 0.0)
    assert step(costs, load_of_four, arrays(1, 3), none, arrays(1)).seconds.tolist() == [2.0, 3.0]


def test_the_first_token_waits_half_a_step_and_for_every_chunk_of_its_prompt() -> None:
    assert first_token_seconds(arrays(0.1), prompt=1000, chunk=512, load=arrays(0))[0] == pytest.approx(0.25)
    light, busy, over = first_token_seconds(arrays(0.1, 0.1, 0.1), 512, 512, arrays(0.1, 0.9, 1.0))
    assert light < busy < np.inf
    assert over == np.inf
