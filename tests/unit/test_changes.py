"""A change of the placement, step by step: who is waited for, what aborts it, and whose proposal goes first."""

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from services.scheduler.change import NOTHING, abort, advance, begin
from services.scheduler.placement import TooFewSlots, budget, rehouse
from services.scheduler.proposals import Priority, first, membership, most_replicas, stage
from shared.changes import Phase, PlacementRecord
from shared.membership import Member
from shared.messages import AttentionFacts, ExpertFacts, Heartbeat, Kind, ModelFacts, Placement, State
from shared.placement.homes import check_homes, to_masks, to_residents
from shared.placement_watch import homes_array, waits_for
from shared.scheduling.policies import Policy

MODEL = ModelFacts(name="m", digest="aa", layers=2, moe_layers=(0, 1), experts=4, top_k=2)
LIMITS = AttentionFacts(max_model_len=1, kv_blocks=1, block_size=1, max_num_seqs=1)


def expert(id: str, loaded: int = 0, state: State = State.READY, detail: str = "", **facts: Any) -> Member:
    experts = ExpertFacts(address=b"x", placement=loaded, **facts)
    beat = Heartbeat(
        kind=Kind.EXPERTS, id=id, incarnation=1, node="n", model=MODEL, state=state, experts=experts, detail=detail
    )
    return Member(beat, 0.0)


def attention(id: str, uses: int, **facts: Any) -> Member:
    limits = LIMITS.model_copy(update={"placement": uses, **facts})
    return Member(
        Heartbeat(kind=Kind.ATTENTION, id=id, incarnation=1, node="n", state=State.READY, attention=limits), 0.0
    )


def proposed(current: Placement | None, *there: Member, homes: int = 0) -> Any:
    return membership(current, there, homes, Policy.ACTIVATED, lambda layer: np.ones(MODEL.experts))


def placement(version: int, *there: Member, homes: int = 0, current: Placement | None = None) -> Placement:
    proposal = proposed(current, *there, homes=homes)
    assert proposal is not None
    return proposal.placement(version, 1, "s")


def steps(record: PlacementRecord, *there: Member, overdue: bool = False) -> PlacementRecord:
    following = advance(record, there, overdue)
    assert following is not None
    assert following.serial == record.serial + 1
    return following


@pytest.fixture
def settled() -> PlacementRecord:
    """Version 1 on e1 alone is in use."""
    record = steps(begin(NOTHING, placement(1, expert("e1"))), expert("e1", 1))
    return steps(record, expert("e1", 1))


@pytest.fixture
def preparing(settled: PlacementRecord) -> PlacementRecord:
    """Version 2, with e2, is being loaded."""
    return begin(settled, placement(2, expert("e1"), expert("e2"), current=settled.committed))


def versions(record: PlacementRecord) -> tuple[Phase, list[int]]:
    return record.phase, [p.version for p in record.versions]


def test_a_change_is_prepared_committed_and_released_with_two_versions_at_most(preparing: PlacementRecord) -> None:
    assert versions(preparing) == (Phase.PREPARE, [1, 2])
    assert preparing.committed and preparing.committed.version == 1
    loaded = expert("e1", 2), expert("e2", 2)
    committed = steps(preparing, *loaded, attention("a", 1))
    assert versions(committed) == (Phase.COMMIT, [1, 2])
    assert committed.committed and committed.committed.version == 2
    assert advance(committed, [*loaded, attention("a", 1)], False) is None
    released = steps(committed, *loaded, attention("a", 2))
    assert versions(released) == (Phase.SETTLED, [2])
    assert "placement 2 (e2 joined) is in use" in released.verdict


def test_every_instance_of_the_new_placement_is_waited_for(preparing: PlacementRecord) -> None:
    there = [expert("e1", 2), expert("e2", 1)]
    assert advance(preparing, there, False) is None
    assert waits_for(preparing, there) == ["e2"]


def test_attention_without_a_placement_or_without_experts_is_not_waited_for(preparing: PlacementRecord) -> None:
    there = [expert("e1", 2), expert("e2", 2), attention("new", 0), attention("alone", 1, monolith=True)]
    assert steps(steps(preparing, *there), *there).phase is Phase.SETTLED


@pytest.mark.parametrize(
    ("there", "overdue", "why"),
    [
        ([expert("e1", 2)], False, "e2 left"),
        ([expert("e1", 2), expert("e2", 0, State.DRAINING)], False, "e2 left"),
        ([expert("e1", 2), expert("e2", 1, refused=2, detail="too few slots")], False, "e2 refuses it: too few slots"),
        ([expert("e1", 2), expert("e2", 1)], True, "e2 did not load it in time"),
    ],
)
def test_a_change_that_cannot_be_prepared_is_aborted_and_the_old_version_stays(
    preparing: PlacementRecord, there: list[Member], overdue: bool, why: str
) -> None:
    record = steps(preparing, *there, overdue=overdue)
    assert versions(record) == (Phase.SETTLED, [1])
    assert record.verdict == f"placement 2 (e2 joined) was aborted: {why}"
    with pytest.raises(ValueError, match="version 2"):
        begin(record, placement(2, expert("e1"), expert("e2"), current=record.committed))


def test_a_late_instance_is_waited_for_when_the_old_version_does_not_serve(settled: PlacementRecord) -> None:
    record = begin(settled, placement(2, expert("e2"), current=settled.committed))
    assert advance(record, [expert("e2", 0)], True) is None, "e1, the only home, is gone"
    assert steps(record, expert("e2", 0), expert("e1", 1, State.DRAINING), overdue=True).phase is Phase.SETTLED


def test_the_old_version_is_released_after_the_limit_and_names_who_is_late(preparing: PlacementRecord) -> None:
    there = [expert("e1", 2), expert("e2", 2), attention("a", 1)]
    record = steps(steps(preparing, *there), *there, overdue=True)
    assert record.phase is Phase.SETTLED
    assert "a did not switch in time" in record.verdict


def test_one_change_at_a_time(preparing: PlacementRecord) -> None:
    with pytest.raises(ValueError, match="prepare"):
        begin(preparing, placement(3, expert("e1")))
    assert abort(preparing, "no").newest == 2


def test_a_settled_record_stays_as_it_is(settled: PlacementRecord) -> None:
    assert advance(settled, [], True) is None


@pytest.mark.parametrize(
    ("there", "priority", "reason"),
    [
        ([expert("e1")], Priority.FAILURE, "e2 left"),
        ([expert("e1"), expert("e2", state=State.DRAINING)], Priority.DRAIN, "e2 draining"),
        ([expert("e1"), expert("e2"), expert("e3")], Priority.JOIN, "e3 joined"),
        ([expert("e1"), expert("e3")], Priority.FAILURE, "e3 joined; e2 left"),
    ],
)
def test_who_comes_and_goes_decides_the_priority(there: list[Member], priority: Priority, reason: str) -> None:
    current = placement(1, expert("e1"), expert("e2"))
    proposal = proposed(current, *there)
    assert (proposal.priority, proposal.reason) == (priority, reason)
    assert list(Priority) == sorted(Priority)


def test_failure_goes_before_drain_before_hand_before_rebalance() -> None:
    one = proposed(None, expert("e1"))
    from dataclasses import replace

    order = [Priority.FAILURE, Priority.DRAIN, Priority.JOIN, Priority.HAND, Priority.REBALANCE]
    proposals = [replace(one, priority=priority) for priority in reversed(order)]
    for priority in order:
        best = first([None, *proposals])
        assert best is not None
        assert best.priority is priority
        proposals.remove(best)
    assert first([None]) is None


def test_a_lost_instance_moves_only_what_it_held() -> None:
    current = placement(1, expert("e1"), expert("e2"), expert("e3"), expert("e4"), homes=1)
    after = placement(2, expert("e1"), expert("e3"), expert("e4"), homes=1, current=current)
    before, now = homes_array(current), homes_array(after)
    assert (np.bitwise_count(now) >= 1).all()
    kept = {0b0001: 0b001, 0b0100: 0b010, 0b1000: 0b100}
    for old, new in zip(before.ravel().tolist(), now.ravel().tolist(), strict=True):
        assert old not in kept or new & kept[old]


def test_instances_with_too_few_slots_are_named_and_nothing_is_proposed() -> None:
    with pytest.raises(TooFewSlots, match="2 expert instances with 1 slots per layer cannot hold 4 experts"):
        proposed(None, expert("e1", slots=3), expert("e2", slots=2))


def test_slots_limit_the_homes_and_a_smaller_limit_makes_another_version() -> None:
    current = placement(1, expert("e1", slots=6), expert("e2", slots=6))
    assert [most_replicas(masks, 2) for masks in homes_array(current)] == [2, 2]
    assert proposed(current, expert("e1", slots=6), expert("e2", slots=8)) is None
    wide = placement(1, expert("e1"), expert("e2"))
    smaller = proposed(wide, expert("e1", slots=4), expert("e2"))
    assert [most_replicas(masks, 2) for masks in smaller.homes] == [2, 2]


@st.composite
def two_placements(draw: st.DrawFn) -> tuple[np.ndarray, np.ndarray, int, int]:
    """(homes now, homes wanted, instances, slots), both within the slots."""
    instances, experts, layers = draw(st.integers(2, 5)), draw(st.integers(1, 8)), draw(st.integers(1, 3))
    slots = draw(st.integers(-(-experts // instances), experts))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))

    def homes() -> np.ndarray:
        empty = [np.zeros((instances, experts), np.bool_)] * layers
        return rehouse(empty, [rng.random(experts) for _ in range(layers)], slots, int(rng.integers(1, instances + 1)))

    def shuffled(masks: np.ndarray) -> np.ndarray:
        return np.stack([to_masks(to_residents(row, instances)[rng.permutation(instances)]) for row in masks])

    return homes(), shuffled(homes()), instances, slots


@settings(deadline=None)
@given(two_placements())
def test_every_stage_can_be_served_and_the_goal_is_reached(case: tuple[np.ndarray, np.ndarray, int, int]) -> None:
    now, goal, instances, slots = case
    for _ in range(3 * now.size):
        if (now == goal).all():
            return
        step = stage(now, goal, instances, slots)
        check_homes(step, range(len(step)), instances, slots)
        in_place = [most_replicas(a | b, instances) > slots for a, b in zip(now, step, strict=True)]
        assert sum(in_place) <= 1, "one layer at a time"
        now = step
    assert (now == goal).all()


def test_one_free_slot_is_enough_for_experts_to_change_places_while_all_are_answered() -> None:
    now, goal, versions = np.array([[1, 1, 2]], np.uint64), np.array([[2, 1, 1]], np.uint64), 0
    while (now != goal).any():
        step = stage(now, goal, instances=2, slots=2)
        assert most_replicas(now[0] | step[0], 2) <= 2, "nothing changes in place"
        now, versions = step, versions + 1
    assert versions == 3


@settings(deadline=None)
@given(st.integers(0, 2**32), st.integers(1, 5), st.integers(1, 9))
def test_rehousing_leaves_no_expert_homeless_and_nobody_overfull(seed: int, instances: int, experts: int) -> None:
    rng = np.random.default_rng(seed)
    members = [expert(f"e{i}", slots=int(rng.integers(0, 30))) for i in range(instances)]
    model = MODEL.model_copy(update={"experts": experts})
    homes = int(rng.integers(1, instances + 1))
    try:
        slots = budget(members, model, homes)
    except TooFewSlots:
        return
    old = [rng.random((instances, experts)) < 0.3 for _ in range(2)]
    masks = rehouse(old, [rng.random(experts) for _ in range(2)], slots, homes)
    check_homes(masks, [0, 1], instances, slots)
