"""Homes by activation: counts, placement, DeepSeek's EPLB as the baseline, re-placement, and what is refused."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shared.elastic.eplb import homes_of_replicas, rebalance_experts
from shared.placement.homes import (
    BadPlacement,
    check_homes,
    homes_of_slots,
    moved_replicas,
    to_masks,
    to_residents,
)
from shared.placement.replacement import fluid_loads, fresh, replace, unevenness
from shared.placement.replication import home_counts, improve, place


@st.composite
def layers(draw):
    """(activity [E], co-activation [E, E], instances, slots) that can be placed."""
    experts, instances = draw(st.integers(1, 24)), draw(st.integers(1, 6))
    slots = draw(st.integers(-(-experts // instances), experts + 2))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    active = rng.random((40, experts)) < rng.random(experts) ** draw(st.sampled_from([0.5, 1, 3]))
    return active.mean(axis=0), active.T.astype(float) @ active / 40, instances, slots


def inner_co_activation(residents: np.ndarray, together: np.ndarray) -> float:
    """The largest sum of co-activation of pairs within an instance."""
    apart = together - np.diag(np.diag(together))
    return max(float(apart[np.ix_(row, row)].sum()) / 2 for row in residents)


def assert_valid(residents: np.ndarray, slots: int) -> None:
    assert residents.any(axis=0).all() and residents.sum(axis=1).max() <= slots


@settings(deadline=None)
@given(layers())
def test_counts_fill_the_slots_and_no_home_is_worth_more_elsewhere(layer):
    activity, _, instances, slots = layer
    counts = home_counts(activity, instances * slots, instances)
    assert counts.sum() == min(instances * slots, len(activity) * instances)
    assert counts.min() >= 1 and counts.max() <= instances
    open_to, given_up = counts < instances, counts > 1
    if open_to.any() and given_up.any():
        assert (activity / counts)[open_to].max() <= (activity[given_up] / (counts[given_up] - 1)).min() + 1e-12


def test_counts_need_a_slot_for_every_expert():
    with pytest.raises(ValueError, match="3 slots cannot hold 4 experts"):
        home_counts(np.ones(4), 3, 2)


@settings(deadline=None)
@given(layers())
def test_a_placement_has_the_homes_that_were_asked_for_and_no_instance_is_overfull(layer):
    activity, together, instances, slots = layer
    counts = home_counts(activity, instances * slots, instances)
    residents = place(activity, together, counts, instances, slots)
    assert residents.sum(axis=0).tolist() == counts.tolist()
    assert_valid(residents, slots)
    check_homes(to_masks(residents)[None], [0], instances, slots)


def test_experts_that_are_active_together_are_kept_apart():
    """Two cliques of four: each instance gets two of either, for a co-activation of 2 pairs instead of 6."""
    together = np.kron(np.eye(2), np.ones((4, 4)))
    residents = place(np.ones(8), together, np.ones(8, np.int64), 2, 4)
    assert inner_co_activation(residents, together) == 2


@settings(deadline=None)
@given(layers())
def test_swaps_never_raise_the_largest_co_activation_nor_change_counts(layer):
    activity, together, instances, slots = layer
    counts = home_counts(activity, instances * slots, instances)
    before = place(activity, np.zeros_like(together), counts, instances, slots)
    after = before.copy()
    improve(after, together - np.diag(np.diag(together)), 50)
    assert inner_co_activation(after, together) <= inner_co_activation(before, together) + 1e-9
    assert after.sum(axis=0).tolist() == before.sum(axis=0).tolist()
    assert after.sum(axis=1).tolist() == before.sum(axis=1).tolist()


def test_the_last_replica_finds_room_when_all_free_slots_are_where_its_expert_is():
    """Experts 1 to 3 shun 0 and fill an instance; 4 needs a home on both, so one of them must join 0 after all."""
    together = np.zeros((5, 5))
    together[0, 1:4] = together[1:4, 0] = [3.0, 2.0, 1.0]
    residents = place(np.array([10, 9, 8, 7, 1.0]), together, np.array([1, 1, 1, 1, 2]), 2, 3)
    assert residents.astype(int).tolist() == [[1, 0, 0, 1, 1], [0, 1, 1, 0, 1]]


def test_eplb_reproduces_the_example_of_its_readme():
    weight = np.array([[90, 132, 40, 61, 104, 165, 39, 4, 73, 56, 183, 86],
                       [20, 107, 104, 64, 19, 197, 187, 157, 172, 86, 16, 27]])  # fmt: skip
    assert rebalance_experts(weight, replicas=16, groups=4, nodes=2, gpus=8).tolist() == [
        [5, 6, 5, 7, 8, 4, 3, 4, 10, 9, 10, 2, 0, 1, 11, 1],
        [7, 10, 6, 8, 6, 11, 8, 9, 2, 4, 5, 1, 5, 0, 3, 1],
    ]


@settings(deadline=None)
@given(st.integers(0, 2**32), st.sampled_from([(1, 1, 4), (4, 2, 4), (3, 2, 4)]))
def test_eplb_places_every_expert_and_keeps_groups_on_their_nodes(seed, topology):
    groups, nodes, gpus = topology
    weight = np.random.default_rng(seed).integers(0, 100, (2, 12)).astype(float)
    table = rebalance_experts(weight, 16, groups, nodes, gpus)
    homes = homes_of_replicas(table, gpus, 12)
    assert (homes > 0).all()
    if groups % nodes == 0 and nodes > 1:
        for masks in homes:
            node = [{0 if int(m) & 0b0011 else 1, 1 if int(m) & 0b1100 else 0} for m in masks]
            assert all(len(set.union(*node[g : g + 3])) == 1 for g in range(0, 12, 3))


def test_eplb_refuses_numbers_that_do_not_divide():
    with pytest.raises(ValueError, match="do not divide"):
        rebalance_experts(np.ones((1, 12)), 15, 1, 1, 4)


@settings(deadline=None)
@given(layers(), st.integers(0, 2**32))
def test_re_placement_stays_valid_within_its_budget_and_only_improves(layer, seed):
    activity, together, instances, slots = layer
    old = fresh(activity, together, instances, slots)
    shifted = activity[np.random.default_rng(seed).permutation(len(activity))]
    new = replace(old, shifted, slots, most=6)
    assert_valid(new, slots)
    assert moved_replicas(to_masks(old), to_masks(new)) <= 6
    assert unevenness(new, shifted) <= unevenness(old, shifted)


def test_nothing_moves_when_nothing_has_changed():
    rng = np.random.default_rng(0)
    active = (rng.random((200, 32)) < rng.random(32)).astype(float)
    homes = fresh(active.mean(axis=0), active.T @ active / 200, 4, 10)
    assert np.array_equal(replace(homes, active.mean(axis=0), 10), homes)


def test_an_expert_that_becomes_hot_gets_homes_in_place_of_one_that_cooled_down():
    old = to_residents(np.array([0b1111, 0b0001, 0b0010, 0b0100, 0b1000], np.uint64), 4)
    new = replace(old, np.array([0.1, 1.0, 0.1, 0.1, 0.1]), slots=2)
    assert new.sum(axis=0)[0] < 4 and new.sum(axis=0)[1] > 1
    assert_valid(new, 2)


@settings(deadline=None)
@given(layers(), st.integers(0, 5))
def test_experts_of_an_instance_that_is_gone_get_homes_on_the_others(layer, gone):
    activity, together, instances, slots = layer
    old = np.delete(fresh(activity, together, instances, slots), gone % instances, axis=0)
    if len(old) * slots < len(activity):
        with pytest.raises(ValueError, match="cannot hold"):
            replace(old, activity, slots)
    else:
        assert_valid(replace(old, activity, slots), slots)


def test_instances_with_more_replicas_than_slots_give_some_up_and_no_expert_is_lost():
    old = to_residents(np.full(8, 0b11, np.uint64), 2)
    assert_valid(replace(old, np.linspace(0.1, 1.0, 8), slots=5), 5)
    assert_valid(replace(old, np.linspace(0.1, 1.0, 8), slots=4), 4)


def test_activity_that_is_no_number_is_refused():
    with pytest.raises(ValueError, match="finite"):
        replace(to_residents(np.full(8, 0b11, np.uint64), 2), np.full(8, np.nan), slots=4)


def test_an_instance_that_joins_gets_its_share():
    activity = np.full(12, 0.5)
    old = np.vstack([np.ones((2, 12), np.bool_), np.zeros((1, 12), np.bool_)])
    loads = fluid_loads(replace(old, activity, 12), activity)
    assert loads.max() < 2.1


@settings(deadline=None)
@given(layers())
def test_fluid_loads_divide_all_activity(layer):
    activity, together, instances, slots = layer
    residents = place(activity, together, home_counts(activity, instances * slots, instances), instances, slots)
    assert fluid_loads(residents, activity).sum() == pytest.approx(activity.sum(), abs=1e-3)


@settings(deadline=None)
@given(st.integers(1, 64), st.integers(1, 9), st.integers(0, 2**32))
def test_masks_and_residents_are_two_forms_of_the_same(instances, experts, seed):
    residents = np.random.default_rng(seed).random((instances, experts)) < 0.5
    assert np.array_equal(to_residents(to_masks(residents), instances), residents)


@pytest.mark.parametrize(
    ("masks", "problem"),
    [
        ([0b01, 0b00, 0b11], "layer 7, expert 1: has no home"),
        ([0b01, 0b100, 0b11], "layer 7, expert 1: has a home beyond the 2 instances"),
        (
            [0b01, 0b01, 0b11],
            "layer 7, expert 2: does not fit on instance 0, which holds 2 replicas per layer and not 3",
        ),
    ],
)
def test_a_bad_table_of_homes_is_refused_by_layer_and_expert(masks, problem):
    with pytest.raises(BadPlacement, match=problem) as caught:
        check_homes(np.array([[1, 1, 2], masks], np.uint64), [3, 7], instances=2, slots=2)
    assert (caught.value.layer, caught.value.expert) == (7, int(problem.split("expert ")[1][0]))


@pytest.mark.parametrize(
    ("slots", "problem"),
    [
        ([[0, 1], [2, 2]], "layer 5, expert 2: is on instance 1 twice"),
        ([[0, 1], [0, -1]], "layer 5, expert 2: has no home"),
        ([[0, 1], [2, 3]], "layer 5, expert 3: does not exist: there are 3"),
    ],
)
def test_a_bad_table_of_slots_is_refused_by_layer_and_expert(slots, problem):
    with pytest.raises(BadPlacement, match=problem):
        homes_of_slots(np.array([slots]), [5], experts=3)


def test_slots_become_homes():
    assert homes_of_slots(np.array([[[0, 1], [2, 0]]]), [5], experts=3).tolist() == [[0b11, 0b01, 0b10]]
