"""Sizes of the pools by demand: growth at once, less after a cool-down, and times that were measured count."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.scheduler.autoscale_settings import Profile
from services.scheduler.autoscaling import (
    A,
    E,
    Look,
    Need,
    Offs,
    Sizes,
    caught_up,
    corrected,
    needed,
    pressed,
    remembered,
    seats,
    target,
)
from services.scheduler.planner import CannotHold, Planner
from services.scheduler.traffic import Traffic
from shared.messages import AttentionFacts
from shared.planning.deciding import Unservable, moving_quantile, nearest
from shared.planning.routing import synthetic
from shared.planning.setting import Demand
from tests.unit.autoscale_cases import fitted, planner, rules, served, steady_traffic, waits

ONE: Sizes = {A: 1, E: 1}


def look(traffic: Traffic, rate: float, sizes: Sizes = ONE, now: float = 30.0, seats: int = 64) -> Look:
    return Look(now, sizes, rate, traffic.seen(30.0, now), traffic.seen(10.0, now), traffic.idle_s(now), seats)


def test_more_requests_need_more_instances() -> None:
    few, many = (needed(look(steady_traffic(rate, 10, 0.06), rate), rules(), planner(), {}).sizes for rate in (1, 3))
    assert sum(many.values()) > sum(few.values())
    assert few == {A: 1, E: 1}


def test_a_mesh_that_is_slower_than_its_model_needs_more_instances() -> None:
    seen = look(steady_traffic(1, 10, 0.06), 1.0)
    fine, slow = (needed(seen, rules(), planner(), {(1, 1): off}) for off in (1.0, 3.0))
    assert sum(slow.sizes.values()) > sum(fine.sizes.values())


def test_measured_over_predicted_times_are_found_and_bounded() -> None:
    sizes = {A: 1, E: 2}
    predicted = planner().tpot(sizes, 4.0, Demand(1.0, 2.0, 10.0))
    seen = look(steady_traffic(2, 10, 1.5 * predicted), 2.0, sizes)
    offs: Offs = {}
    for _ in range(100):
        offs = corrected(offs, seen, planner())
    batch = 2 * 10 * 1.5 * predicted
    assert offs[1, 2] == pytest.approx(1.5 * predicted / planner().tpot(sizes, batch, Demand(1.0, 2.0, 10.0)), rel=0.05)
    assert corrected({}, look(steady_traffic(2, 10, 100.0), 2.0), planner())[1, 1] <= 1.3


def test_what_is_more_than_the_pools_may_serve_gets_all_they_may_and_says_so() -> None:
    need = needed(look(steady_traffic(50, 10, 0.5), 50.0), rules(), planner(), {})
    assert need.sizes[A] == 3
    assert "more than can be served in time" in need.why


@pytest.mark.parametrize(("there", "kept"), [({A: 2, E: 3}, {A: 2, E: 3}), ({A: 1, E: 0}, ONE)])
def test_limits_that_nothing_keeps_are_said_and_keep_what_there_is_with_experts_at_least(
    there: Sizes, kept: Sizes
) -> None:
    need = needed(look(steady_traffic(1, 10, 0.06), 1.0, there), rules(0, tpot_s=1e-3), planner(0), {})
    assert need.sizes == kept
    assert "no plan serves any rate" in need.why


def test_a_backlog_is_planned_for_besides() -> None:
    """20 requests more than may be open at 0.2 s per token, in a window of 10 s."""
    seen = look(steady_traffic(2, 10, 0.1), 2.0)
    usual = caught_up(seen, rules())
    assert usual == seen.demand
    late = replace(seen, lately=replace(seen.lately, open=round(usual.rate * usual.output * 0.2 + 20)))
    assert caught_up(late, rules()).rate == pytest.approx(usual.rate + 2, abs=0.1)


def test_streams_that_neither_begin_nor_end_are_planned_for() -> None:
    """30 streams of 10 tokens per second each, whose requests came before anything that is remembered."""
    traffic = Traffic(30.0, 0.0)
    traffic.add(served(arrived=30, prompt_tokens=30 * 50, open=30), 1.0)
    for second in range(2, 90):
        traffic.add(served(output_tokens=300, open=30, inter=waits(300, 0.1)), float(second))
    seen = look(traffic, 0.0, {A: 3, E: 3}, now=89.0)
    assert (seen.demand.prompt, seen.demand.rate * seen.demand.output) == (50.0, pytest.approx(300, rel=0.05))
    alone = planner().tpot(ONE, 30.0, seen.demand)
    assert alone > rules().slo.tpot_s
    assert needed(seen, rules(), planner(), {}).sizes != ONE


def test_a_pool_without_an_instance_says_nothing_of_times() -> None:
    offs = {(1, 1): 1.5}
    for there in ({A: 0, E: 1}, {A: 1, E: 0}):
        assert corrected(offs, look(steady_traffic(2, 10, 0.1), 2.0, there), planner()) == offs


def test_a_pool_at_none_stays_there_until_somebody_asks() -> None:
    quiet = look(Traffic(30.0, 0.0), 0.0, {A: 1, E: 0}, now=1.0)
    assert needed(quiet, rules(0), planner(0), {}).sizes[E] == 0


def test_sequences_that_find_no_seat_need_more_attention_instances() -> None:
    traffic = steady_traffic(3, 10, 0.06)
    assert needed(look(traffic, 3.0), rules(), planner(), {}).sizes[A] == 1
    assert needed(look(traffic, 3.0, seats=1), rules(), planner(), {}).sizes[A] > 1


def test_the_expert_pool_goes_to_none_when_it_may_and_comes_back_when_a_request_waits() -> None:
    traffic = Traffic(30.0, 0.0)
    traffic.add(served(), 150.0)
    idle = look(traffic, 0.0, now=150.0)
    assert needed(idle, rules(least_experts=0), planner(), {}).sizes == {A: 1, E: 0}
    assert needed(idle, rules(), planner(), {}).sizes == {A: 1, E: 1}
    assert needed(replace(idle, idle_s=50.0), rules(least_experts=0), planner(), {}).sizes == {A: 1, E: 1}
    traffic.add(served(open=1), 151.0)
    waiting = look(traffic, 0.0, {A: 1, E: 0}, now=151.0)
    assert needed(waiting, rules(least_experts=0), planner(), {}).sizes[E] >= 1


def test_times_beyond_their_limit_ask_for_one_more_where_it_helps_whatever_the_model_says() -> None:
    seen = look(steady_traffic(1, 10, 0.3), 1.0)
    assert needed(seen, rules(), planner(), {}).sizes == ONE
    more = pressed(seen, rules(), planner())
    assert more
    assert more.sizes == {A: 1, E: 2}
    assert "300 ms per token were measured, 200 are allowed" in more.why
    full = pressed(replace(seen, sizes={A: 1, E: 3}), rules(), planner())
    assert full
    assert full.sizes == {A: 2, E: 3}
    assert pressed(look(steady_traffic(1, 10, 0.06), 1.0), rules(), planner()) is None


def test_late_first_tokens_ask_for_attention() -> None:
    more = pressed(look(steady_traffic(1, 10, 0.15), 1.0), rules(ttft_s=0.1), planner())
    assert more
    assert more.sizes == {A: 2, E: 1}


def test_times_of_a_mesh_that_has_just_changed_do_not_press() -> None:
    traffic = steady_traffic(1, 10, 0.3)
    seen = replace(look(traffic, 1.0), steady=traffic.seen(5.0, 30.0))
    assert pressed(seen, rules(), planner()) is None


def targets(needs: list[tuple[float, int]], sizes: Sizes, cooldown_s: float = 60.0) -> dict[str, int]:
    """Of needs (time, experts), one after the other."""
    kept: list[Need] = []
    for at, experts in needs:
        kept = remembered(kept, Need(at, {A: 1, E: experts}, ""), cooldown_s)
    return {pool.value: size for pool, size in target(kept, sizes, cooldown_s).items()}


def test_a_pool_grows_at_once() -> None:
    assert targets([(0.0, 1), (1.0, 3)], ONE) == {"experts": 3}


def test_a_pool_shrinks_when_less_was_enough_for_a_whole_cool_down() -> None:
    large: Sizes = {A: 1, E: 3}
    assert targets([(0.0, 1), (30.0, 1), (59.0, 1)], large) == {}
    assert targets([(0.0, 1), (30.0, 1), (60.0, 1)], large) == {"experts": 1}
    assert targets([(0.0, 1), (30.0, 2), (60.0, 1)], large) == {"experts": 2}
    assert targets([(0.0, 1), (30.0, 3), (60.0, 1)], large) == {}


@given(st.lists(st.integers(1, 5), min_size=1, max_size=100), st.integers(1, 5), st.integers(0, 30))
def test_no_target_is_below_what_was_needed_within_the_cool_down(needs: list[int], size: int, cooldown: int) -> None:
    found = targets([(float(i), n) for i, n in enumerate(needs)], {A: 1, E: size}, cooldown).get("experts", size)
    assert found >= needs[-1]
    if found < size:
        assert found == max(needs[-(cooldown + 1) :])


def test_seats_follow_from_the_cache_and_from_the_limit_of_a_step() -> None:
    facts = AttentionFacts(max_model_len=2048, kv_blocks=100, block_size=16, max_num_seqs=64)
    assert seats([facts], 160.0) == 10
    assert seats([facts], 2.0) == 64
    assert seats([], 100.0) == 64


def test_a_rate_that_cannot_be_served_gets_the_plan_for_the_most_that_can() -> None:
    assert nearest(lambda rate: rate if rate <= 5 else None, 10.0) == pytest.approx(4.78, abs=0.01)
    with pytest.raises(Unservable):
        nearest(lambda rate: None, 10.0)


def test_few_rates_are_tried_for_it() -> None:
    tried: list[float] = []
    assert nearest(lambda rate: tried.append(rate) or (rate if rate <= 0.01 else None), 1000.0) == pytest.approx(
        0.00955, rel=0.05
    )
    assert len(tried) <= 10


def test_the_next_rate_is_a_quantile_of_the_last_few() -> None:

    rates = np.array([9.0, 1.0, 2.0, 3.0])
    assert moving_quantile(rates, 3, 1.0) == 3.0
    assert moving_quantile(rates, 3, 0.5) == 2.0


def test_sizes_that_were_too_slow_are_not_gone_back_to_because_others_are_as_fast_as_foreseen() -> None:
    seen = look(steady_traffic(1, 10, 0.04), 1.0, {A: 1, E: 2})
    assert needed(seen, rules(), planner(), {(1, 2): 1.0}).sizes == ONE
    assert needed(seen, rules(), planner(), {(1, 1): 3.0, (1, 2): 1.0}).sizes == {A: 1, E: 2}
    forgiven = corrected({(1, 1): 3.0, (1, 2): 1.0}, seen, planner())
    assert 1.0 < forgiven[1, 1] < 3.0
    slow = look(steady_traffic(1, 10, 1.0), 1.0, {A: 1, E: 2})
    assert corrected({(1, 1): 1.0, (1, 2): 1.0}, slow, planner())[1, 1] == 1.0


def test_slots_that_cannot_hold_the_model_in_as_many_instances_as_were_profiled_are_said() -> None:
    with pytest.raises(CannotHold, match="3 expert instances with 10 slots per layer cannot hold 32 experts"):
        Planner(Profile(fitted(), synthetic(32, 4, 0.6), ""), 10, rules())
