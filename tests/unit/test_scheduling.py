"""Replica choice: deterministic, never a wrong home, and as balanced as can be."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shared.activation import Choice, choose_replicas, exchange_digest, plan_exchange, schedule_activations
from shared.scheduling.optimum import fits, least_a_max
from shared.scheduling.policies import Policy
from tests.unit.exchanges import exchanges, hosts_of, plain_choice

POLICIES = pytest.mark.parametrize("policy", Policy)


def test_worked_example_of_the_greedy():
    """Experts 2 and 3 have one home; 0 and 1 then go where fewer experts are active."""
    homes = np.array([0b011, 0b111, 0b001, 0b001], np.uint64)
    schedule = schedule_activations(np.array([[0, 1], [2, 3]], np.int32), homes, 0b111)
    assert schedule.replicas.tolist() == [[1, 2], [0, 0]]
    assert schedule.activated.tolist() == [2, 1, 1]


def test_worked_example_of_a_chain_of_moves():
    """The greedy puts 0 and 2 on the first instance and 1 on the second; 1 must make room there before 2 can come."""
    homes = np.array([0b001, 0b110, 0b011], np.uint64)
    schedule = schedule_activations(np.array([[0, 1, 2]], np.int32), homes, 0b111)
    assert schedule.replicas.tolist() == [[0, 2, 1]]
    assert schedule.activated.tolist() == [1, 1, 1]


@settings(deadline=None, max_examples=500)
@given(exchanges())
def test_the_choice_is_that_of_the_plain_algorithm(exchange):
    """Its value is part of the protocol: every build and every device must choose alike."""
    ids, homes, live = exchange
    chosen = plain_choice(hosts_of(ids, homes, live))
    assert choose_replicas(ids, homes, live).tolist() == [[chosen[e] for e in row] for row in ids.tolist()]


@settings(deadline=None, max_examples=500)
@given(exchanges())
def test_a_max_is_the_optimum(exchange):
    ids, homes, live = exchange
    assert schedule_activations(ids, homes, live).activated.max() == least_a_max(ids, homes, live)


@pytest.mark.parametrize("spread", [1.0, 2.0])
@pytest.mark.parametrize("instances", [3, 16, 64])
def test_a_max_is_the_optimum_where_the_greedy_alone_is_not(instances, spread):
    """Large layers with few homes: here the greedy fails about every second time."""
    rng = np.random.default_rng(instances)
    ids = np.arange(4 * instances, dtype=np.int32).reshape(-1, 2)
    for _ in range(20):
        homes = np.zeros(ids.size, np.uint64)
        for e in range(ids.size):
            for i in rng.choice(instances, 1 + min(rng.poisson(spread), instances - 1), replace=False):
                homes[e] |= np.uint64(1 << int(i))
        schedule = schedule_activations(ids, homes, (1 << instances) - 1)
        assert schedule.activated.max() == least_a_max(ids, homes, (1 << instances) - 1)
        assert schedule.activated.sum() == ids.size


@settings(deadline=None)
@given(exchanges(), st.randoms())
def test_the_choice_depends_only_on_the_set_of_activated_experts(exchange, random):
    """A group's rows may arrive in any order: the same experts go to the same instances."""
    ids, homes, live = exchange
    order = list(range(len(ids)))
    random.shuffle(order)
    assert np.array_equal(choose_replicas(ids[order], homes, live), choose_replicas(ids, homes, live)[order])


@POLICIES
@settings(deadline=None)
@given(exchange=exchanges())
def test_every_policy_picks_live_homes_counts_what_it_activates_and_repeats_itself(policy, exchange):
    ids, homes, live = exchange
    replicas, activated = schedule_activations(ids, homes, live, policy)
    assert all((int(homes[e]) & live) >> i & 1 for e, i in zip(ids.ravel(), replicas.ravel(), strict=True))
    pairs = set(zip(ids.ravel().tolist(), replicas.ravel().tolist(), strict=True))
    assert activated.tolist() == [sum(i == at for _, i in pairs) for at in range(live.bit_length())]
    again = schedule_activations(np.asfortranarray(ids), homes, live, policy)
    assert np.array_equal(replicas, again.replicas)
    digest = plan_exchange(ids, np.ones(ids.shape, np.float32), Choice(homes, live, 0, policy))[1]
    assert digest == exchange_digest(ids, replicas)


@settings(deadline=None)
@given(exchanges())
def test_tokens_are_split_evenly_over_the_homes_of_an_expert(exchange):
    ids, homes, live = exchange
    replicas = choose_replicas(ids, homes, live, Policy.TOKENS)
    for e, hosts in hosts_of(ids, homes, live).items():
        shares = [int(((ids == e) & (replicas == i)).sum()) for i in hosts]
        assert max(shares) - min(shares) <= 1


@settings(deadline=None)
@given(exchanges())
def test_first_is_the_lowest_live_home(exchange):
    ids, homes, live = exchange
    hosts = hosts_of(ids, homes, live)
    assert choose_replicas(ids, homes, live, Policy.FIRST).tolist() == [
        [hosts[e][0] for e in row] for row in ids.tolist()
    ]


def test_random_draws_every_home_alike_and_anew_in_each_exchange():
    homes = np.full(64, 0b1111, np.uint64)
    rng = np.random.default_rng(0)
    drawn = [choose_replicas(rng.permuted(np.arange(64, dtype=np.int32))[:, None], homes, 0b1111, Policy.RANDOM)
             for _ in range(100)]  # fmt: skip
    shares = np.bincount(np.concatenate(drawn).ravel(), minlength=4) / 6400
    assert np.all(abs(shares - 0.25) < 0.03)


@POLICIES
@pytest.mark.parametrize("wrong", [-1, 4, 2**31 - 1])
def test_ids_outside_the_layer_are_refused(policy, wrong):
    with pytest.raises(ValueError, match=r"0\.\.3"):
        choose_replicas(np.array([[0, wrong]], np.int32), np.ones(4, np.uint64), 1, policy)


@POLICIES
def test_the_highest_instance_can_be_chosen(policy):
    one = np.array([1 << 63], np.uint64)
    assert choose_replicas(np.array([[0]], np.int32), one, 1 << 63, policy).tolist() == [[63]]


@POLICIES
def test_no_rows_activate_nothing(policy):
    replicas, activated = schedule_activations(np.empty((0, 2), np.int32), np.ones(4, np.uint64), 0b11, policy)
    assert replicas.shape == (0, 2) and activated.tolist() == [0, 0]


@settings(deadline=None)
@given(exchanges())
def test_the_yardstick_is_the_least_of_all_choices(exchange):
    """``least_a_max`` against trying everything."""
    ids, homes, live = exchange
    hosts = list(hosts_of(ids, homes, live).values())[:7]
    tops = {0}
    loads = {(0,) * 6}
    for mine in hosts:
        loads = {tuple(n + (i == at) for i, n in enumerate(load)) for load in loads for at in mine}
        tops = {max(load) for load in loads}
    assert fits(hosts, min(tops)) and not fits(hosts, min(tops) - 1)
