"""The view of the mesh, driven by hand: heartbeats in, a clock that only the test moves."""

from typing import Any

import pytest

from shared.membership import GONE_AFTER_S, SUSPECT_AFTER_S, SUSPEND_S, Members
from shared.messages import AttentionFacts, ExpertFacts, Heartbeat, Kind, State


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def beat(id: str = "e1", incarnation: int = 1, state: State = State.READY, **more: Any) -> Heartbeat:
    kind = more.pop("kind", Kind.EXPERTS)
    return Heartbeat(kind=kind, id=id, incarnation=incarnation, state=state, node="n", **more)


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def members(clock: Clock) -> Members:
    """A watcher that has been listening long enough to judge."""
    view = Members("m", "own", clock)
    clock.now += SUSPEND_S + 1
    return view


def pass_time(members: Members, clock: Clock, seconds: float, speaking: list[Heartbeat]) -> None:
    """Let time pass in steps of a quarter second, in which only ``speaking`` beat."""
    for _ in range(round(seconds * 4)):
        clock.now += 0.25
        for heartbeat in speaking:
            members.beat(heartbeat)
        members.judge()


OWN = beat("own", 9, kind=Kind.ATTENTION)


def test_ready_lists_only_ready_members_of_the_kind_sorted_by_id(members: Members) -> None:
    members.beat(beat("e2"))
    members.beat(beat("e1"))
    members.beat(beat("e3", state=State.STARTING))
    members.beat(beat("a1", kind=Kind.ATTENTION))
    assert [m.id for m in members.ready(Kind.EXPERTS)] == ["e1", "e2"]


def test_a_silent_member_is_suspect_after_three_seconds_and_gone_after_ten(members: Members, clock: Clock) -> None:
    members.beat(beat())
    pass_time(members, clock, SUSPECT_AFTER_S - 0.5, [OWN])
    assert not members.ready(Kind.EXPERTS)[0].suspect
    pass_time(members, clock, 1.0, [OWN])
    assert members.ready(Kind.EXPERTS)[0].suspect
    pass_time(members, clock, GONE_AFTER_S - SUSPECT_AFTER_S, [OWN])
    assert members.get("e1") is None
    assert members.get("own") is not None


def test_a_suspect_that_beats_again_is_trusted_again(members: Members, clock: Clock) -> None:
    members.beat(beat())
    pass_time(members, clock, 4.0, [OWN])
    members.beat(beat())
    found = members.get("e1")
    assert found is not None
    assert not found.suspect


def test_a_watcher_that_lost_nats_judges_nobody_until_five_seconds_after_its_return(
    members: Members, clock: Clock
) -> None:
    members.beat(beat())
    members.connection(False)
    pass_time(members, clock, 60.0, [])
    members.connection(True)
    pass_time(members, clock, SUSPEND_S - 0.5, [OWN])
    found = members.get("e1")
    assert found is not None
    assert not found.suspect
    pass_time(members, clock, 1.0, [OWN])
    assert members.ready(Kind.EXPERTS)[0].suspect


def test_a_watcher_whose_own_heartbeats_do_not_come_back_judges_nobody(members: Members, clock: Clock) -> None:
    members.beat(OWN)
    members.beat(beat())
    pass_time(members, clock, 60.0, [])
    found = members.get("e1")
    assert found is not None
    assert not found.suspect


def test_a_new_incarnation_replaces_the_old_one_whose_late_words_are_ignored(members: Members) -> None:
    members.beat(beat(incarnation=1))
    members.beat(beat(incarnation=2, state=State.STARTING))
    members.beat(beat(incarnation=1))
    members.beat(beat(incarnation=1, state=State.GONE))
    found = members.get("e1")
    assert found is not None
    assert (found.heartbeat.incarnation, found.heartbeat.state) == (2, State.STARTING)


def test_a_second_start_with_the_same_id_that_gives_up_leaves_the_first_one_in_place(members: Members) -> None:
    members.beat(beat(incarnation=1))
    members.beat(beat(incarnation=2, state=State.STARTING))
    members.beat(beat(incarnation=2, state=State.GONE))
    assert members.get("e1") is None
    members.beat(beat(incarnation=1))
    assert [m.heartbeat.incarnation for m in members.ready(Kind.EXPERTS)] == [1]


def test_a_member_that_said_gone_stays_gone(members: Members) -> None:
    members.beat(beat())
    members.beat(beat(state=State.GONE))
    members.beat(beat())
    assert members.all() == []


def test_changes_are_reported_once_and_load_figures_are_no_change(members: Members, clock: Clock) -> None:
    changes: list[float] = []
    members.on_change(lambda: changes.append(clock.now))
    load = AttentionFacts(max_model_len=1, kv_blocks=1, block_size=1, max_num_seqs=1)
    members.beat(beat(kind=Kind.ATTENTION, attention=load))
    members.beat(beat(kind=Kind.ATTENTION, attention=load.model_copy(update={"running": 3})))
    assert len(changes) == 1
    members.beat(beat(kind=Kind.ATTENTION, attention=load.model_copy(update={"placement": 2})))
    assert len(changes) == 2
    members.beat(beat("e2", experts=ExpertFacts(address=b"x")))
    members.beat(beat("e2", experts=ExpertFacts(address=b"x", placement=1)))
    assert len(changes) == 4
