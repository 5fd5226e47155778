"""Sizes of pools: what may be asked for, and which change is made next."""

import pytest

from services.scheduler.placement import TooFewSlots
from services.scheduler.pools import (
    AGAIN_S,
    BY_HAND,
    LONGEST_RETRY_S,
    LONGEST_S,
    RETRY_S,
    Asked,
    Change,
    by_hand,
    check,
    next_change,
    present,
    unfinished,
)
from shared.errors import Refused
from shared.membership import Member
from shared.messages import ExpertFacts, Heartbeat, Kind, ModelFacts, Pool, State
from shared.pool_messages import Wish

MODEL = ModelFacts(name="m", digest="aa", layers=2, moe_layers=(0, 1), experts=4, top_k=2)
A, E = Pool.ATTENTION, Pool.EXPERTS


def member(kind: Kind, state: State = State.READY, slots: int = 0) -> Member:
    facts = ExpertFacts(address=b"x", slots=slots) if kind is Kind.EXPERTS else None
    return Member(Heartbeat(kind=kind, id="i", incarnation=1, state=state, node="n", experts=facts), 0.0)


def test_who_is_leaving_is_not_there_and_who_starts_is():
    members = [
        member(Kind.EXPERTS),
        member(Kind.EXPERTS, State.STARTING),
        member(Kind.EXPERTS, State.DRAINING),
        member(Kind.GATEWAY),
    ]
    assert present(members) == {A: 0, E: 2}


def test_nothing_is_changed_that_nobody_has_asked_for():
    assert next_change({}, {A: 1, E: 2}, {}, 0.0) is None
    assert next_change({E: 2}, {A: 1, E: 2}, {}, 0.0) is None


def test_a_pool_that_grows_goes_before_one_that_shrinks():
    assert next_change({A: 1, E: 3}, {A: 2, E: 1}, {}, 0.0) == Change(E, 3)
    assert next_change({A: 1, E: 3}, {A: 2, E: 1}, {E: Asked(3, 0.0)}, 1.0) == Change(A, 1)


def test_the_actuator_is_left_alone_while_instances_come_and_asked_again_when_they_do_not():
    asked = {E: Asked(3, 100.0)}
    assert next_change({E: 3}, {A: 1, E: 1}, asked, 100.0 + AGAIN_S - 1) is None
    assert next_change({E: 3}, {A: 1, E: 1}, asked, 100.0 + AGAIN_S) == Change(E, 3)


def test_something_else_is_asked_for_at_once_also_after_a_failure():
    assert next_change({E: 2}, {A: 1, E: 1}, {E: Asked(3, 100.0, failures=5)}, 100.0) == Change(E, 2)


@pytest.mark.parametrize(
    ("failures", "wait"), [(1, RETRY_S), (2, 2 * RETRY_S), (3, 4 * RETRY_S), (9, LONGEST_RETRY_S), (5000, 60.0)]
)
def test_waits_between_attempts_that_fail_rise_to_a_limit(failures: int, wait: float):
    asked = {E: Asked(3, 100.0, failures)}
    assert next_change({E: 3}, {A: 1, E: 1}, asked, 100.0 + wait - 0.1) is None
    assert next_change({E: 3}, {A: 1, E: 1}, asked, 100.0 + wait) == Change(E, 3)


@pytest.mark.parametrize(
    ("pool", "count", "words"),
    [
        (A, 0, "attention: 0 instances; there must be at least 1"),
        (E, -1, "experts: -1 instances; there must be at least 0"),
        (E, 65, "experts: 65 instances; a placement takes at most 64"),
    ],
)
def test_sizes_out_of_range_are_refused(pool: Pool, count: int, words: str):
    with pytest.raises(Refused, match=words):
        check(pool, count, [], None)


def test_so_few_expert_instances_that_the_model_does_not_fit_are_refused_but_none_at_all_are_not():
    members = [member(Kind.EXPERTS, slots=2 * 2) for _ in range(2)]
    with pytest.raises(TooFewSlots, match=r"1 expert instances with 2 slots .* cannot hold 4 experts: it takes 2"):
        check(E, 1, members, MODEL)
    check(E, 2, members, MODEL)
    check(E, 0, members, MODEL)


def test_instances_without_room_for_one_expert_per_layer_are_refused_in_words():
    with pytest.raises(TooFewSlots, match="it takes more slots"):
        check(E, 60, [member(Kind.EXPERTS, slots=1)], MODEL)


def test_without_expert_instances_nobody_knows_their_slots_and_any_number_may_come_back():
    check(E, 1, [member(Kind.ATTENTION)], MODEL)


def wish(count: int, reason: str = "autoscaling", at: float = 1000.0) -> Wish:
    return Wish(count=count, author="s", reason=reason, time=at)


@pytest.mark.parametrize(
    ("count", "states", "said"),
    [
        (1, [State.READY], ""),
        (2, [State.READY, State.STARTING], "experts: 1 of 2 are ready"),
        (1, [State.READY, State.DRAINING], "experts: 1 of 1 are ready, 1 drain"),
        (0, [], ""),
    ],
)
def test_a_change_is_finished_when_all_are_ready_and_nobody_leaves(count: int, states: list[State], said: str):
    members = [member(Kind.EXPERTS, state) for state in states]
    assert unfinished({E: wish(count)}, members, 1001.0) == said
    assert unfinished({E: wish(count)}, members, 1000.0 + LONGEST_S) == ""


def test_what_a_person_has_asked_for_is_kept_for_a_while():
    assert by_hand({E: wish(3, BY_HAND)}, 60.0, 1020.0) == "experts: 3 by hand, kept for 40 s more"
    assert by_hand({E: wish(3, BY_HAND)}, 60.0, 1060.0) == ""
    assert by_hand({E: wish(3)}, 60.0, 1020.0) == ""
