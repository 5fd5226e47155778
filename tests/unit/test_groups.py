"""Who runs a step together: meetings, groups on the wire and in doubt, and how often an instance goes to meetings."""

import struct

import pytest

from services.attention.groups import (
    LONGEST_PATIENCE_S,
    LONGEST_WAIT_S,
    MOST_SKIPPED,
    SHORTEST_WAIT_S,
    Group,
    Join,
    Meeting,
    Patience,
    longest_wait,
    patience_for,
)
from services.attention.ways import ALL_WAYS, Gate, Phase, Way

WAIT = 1.0


def join(name: int, rows: int = 4, number: int = 1, placement: int = 1, live: int = 3, until: float = 99.0) -> Join:
    return Join(name, number, rows, placement, live, until)


def meeting(*joins: Join, max_rows: int = 64) -> Meeting:
    made = Meeting(max_rows)
    for one in joins:
        made.join(one, 0.0, WAIT)
    return made


def names(groups: list[list[Join]]) -> list[list[int]]:
    return [[one.incarnation for one in group] for group in groups]


# ---- meetings -----------------------------------------------------------------------------------------------


def test_one_that_nobody_else_is_expected_by_waits_for_nobody():
    assert meeting(join(1)).complete(0.0)


def test_those_who_came_the_last_time_are_waited_for_and_no_longer_than_the_wait():
    made = meeting(join(1), join(2))
    made.form([1, 2], 0.0)
    made.join(join(1, number=2), 10.0, WAIT)
    assert not made.complete(10.0)
    assert not made.complete(10.9)
    assert made.complete(11.0)
    made.join(join(2, number=2), 10.5, WAIT)
    assert made.complete(10.5)


def test_one_that_did_not_come_is_not_waited_for_again():
    made = meeting(join(1), join(2))
    made.form([1, 2], 0.0)
    made.join(join(1, number=2), 10.0, WAIT)
    made.form([1, 2], 11.0)
    made.join(join(1, number=3), 12.0, WAIT)
    assert made.complete(12.0)


def test_one_that_is_gone_is_neither_waited_for_nor_grouped():
    made = meeting(join(1), join(2))
    made.leave([2])
    assert made.complete(0.0)
    assert names(made.form([1, 2], 0.0)) == [[1]]


def test_one_that_came_and_went_on_alone_is_waited_for_like_any_other():
    made = meeting(join(1), join(2, until=5.0))
    assert made.complete(0.5)
    made.join(join(1, number=2), 6.0, WAIT)
    made.due = 7.0
    assert not made.complete(6.0)


def test_an_empty_meeting_is_never_complete():
    made = Meeting(64)
    assert not made.complete(1e9)
    assert made.form([1, 2], 0.0) == []


def test_members_are_in_the_order_that_all_agree_on_whoever_came_first():
    assert names(meeting(join(3), join(1), join(2)).form([1, 2, 3], 0.0)) == [[1, 2, 3]]


def test_one_whom_the_host_does_not_know_is_left_out():
    assert names(meeting(join(1), join(7)).form([1, 2], 0.0)) == [[1]]


def test_one_that_has_waited_too_long_is_alone_already():
    assert names(meeting(join(1), join(2, until=5.0)).form([1, 2], 5.0)) == [[1]]


@pytest.mark.parametrize("other", [{"placement": 2}, {"live": 1}])
def test_those_who_would_choose_replicas_differently_are_never_in_one_group(other):
    made = meeting(join(1), join(2, **other), join(3))
    assert names(made.form([1, 2, 3], 0.0)) == [[1, 3], [2]]


def test_a_group_has_no_more_rows_than_an_exchange_may_have():
    made = meeting(join(1, 40), join(2, 30), join(3, 24), join(4, 34))
    assert names(made.form([1, 2, 3, 4], 0.0)) == [[1, 3], [2, 4]]


def test_a_late_copy_of_a_join_brings_nobody_back():
    made = meeting(join(1, number=5), join(2, number=5))
    made.form([1, 2], 0.0)
    assert not made.join(join(2, number=5), 1.0, WAIT)
    assert not made.join(join(2, number=4), 1.0, WAIT)
    assert not made.joins
    assert made.join(join(2, number=6), 1.0, WAIT)


def test_an_instance_that_has_gone_and_come_back_may_count_from_one_again():
    made = meeting(join(2, number=9))
    made.leave([2])
    assert made.join(join(2, number=1), 0.0, WAIT)


def test_a_newer_join_replaces_the_older_one():
    made = meeting(join(1), join(2, rows=4), join(2, rows=6, number=2))
    [group] = made.form([1, 2], 0.0)
    assert [one.rows for one in group] == [4, 6]


# ---- groups -------------------------------------------------------------------------------------------------

GROUP = Group(77, ((1 << 63, 3), (5, 2), (9, 1)), Way(Phase.RELAY, Gate.ATTENTION), 4, 0b101)
MINE = join(5, rows=2, placement=4, live=0b101)


@pytest.mark.parametrize("way", ALL_WAYS, ids=str)
def test_a_group_survives_the_wire(way):
    group = GROUP._replace(way=way)
    assert Group.unpack(77, 4, 0b101, group.pack()) == group


def test_rows_lie_in_the_order_of_members():
    assert GROUP.leader == 1 << 63
    assert GROUP.total == 6
    assert [GROUP.first(name) for name, _ in GROUP.members] == [0, 3, 5]


PACKED = GROUP.pack()


@pytest.mark.parametrize(
    "meta",
    [
        b"", b"\0", PACKED[:-1], PACKED + b"\0", PACKED[:4], PACKED[:20],
        struct.pack("<I", len(ALL_WAYS)) + PACKED[4:], struct.pack("<I", 2**32 - 1) + PACKED[4:],
    ],
)  # fmt: skip
def test_what_is_no_group_is_told_by_an_exception_that_the_reader_knows(meta):
    with pytest.raises((struct.error, ValueError, IndexError)):
        Group.unpack(77, 4, 0b101, meta)


def test_one_takes_part_in_a_group_that_has_its_join():
    assert GROUP.suits(MINE, 64, {1 << 63, 9})


@pytest.mark.parametrize(
    ("group", "mine", "known"),
    [
        (GROUP, MINE._replace(rows=3), {1 << 63, 9}),
        (GROUP, MINE._replace(incarnation=6), {1 << 63, 9}),
        (GROUP, MINE._replace(placement=5), {1 << 63, 9}),
        (GROUP, MINE._replace(live=0b111), {1 << 63, 9}),
        (GROUP, MINE, {9}),
        (GROUP._replace(members=((5, 2), (9, 63))), MINE, {9}),
        (GROUP._replace(members=((5, 2), (9, 2**63))), MINE, {9}),
        (GROUP._replace(members=((5, 2), (9, 0))), MINE, {9}),
        (GROUP._replace(members=((5, 2), (9, 1), (9, 1))), MINE, {9}),
        (GROUP._replace(members=((5, 2), (5, 2))), MINE, {9}),
    ],
    ids=[
        "other rows", "not in it", "placement", "live mask", "unknown leader", "too many rows", "absurd rows",
        "no rows", "one twice", "itself twice",
    ],
)  # fmt: skip
def test_one_does_not_take_part_in_a_group_that_cannot_work_for_it(group, mine, known):
    assert not group.suits(mine, 64, known)


# ---- joins and patience -------------------------------------------------------------------------------------


def test_a_join_survives_the_wire_and_asks_for_bounded_patience():
    assert Join.unpack(Join.pack(7, 0.25)) == (7, pytest.approx(0.25))
    assert Join.unpack(struct.pack("<II", 7, 2**32 - 1)) == (7, LONGEST_PATIENCE_S)


@pytest.mark.parametrize("meta", [b"", b"\0" * 7, b"\0" * 9, b"\0" * 8])
def test_what_is_no_join_is_told_by_an_exception_that_the_reader_knows(meta):
    with pytest.raises((struct.error, ValueError)):
        Join.unpack(meta)


def skipped(patience: Patience) -> int:
    """Steps until it goes to a meeting."""
    return next(n for n in range(1000) if patience.goes())


def test_who_meets_nobody_goes_ever_more_seldom_but_never_stops():
    patience = Patience()
    gaps = []
    for _ in range(8):
        gaps.append(skipped(patience))
        patience.came_back(False)
    assert gaps == [0, 1, 2, 4, 8, 16, 32, 32]
    assert gaps[-1] == MOST_SKIPPED


def test_who_has_met_somebody_goes_every_time():
    patience = Patience()
    for grouped in (False, False, False, True):
        skipped(patience)
        patience.came_back(grouped)
    assert skipped(patience) == 0


def test_waits_are_a_share_of_the_last_step_within_bounds():
    assert longest_wait(0.1, 0.1) == pytest.approx(0.01)
    assert longest_wait(0.1, 0.0) == SHORTEST_WAIT_S
    assert longest_wait(0.1, 60.0) == LONGEST_WAIT_S
    assert patience_for(0.02) == pytest.approx(0.03)
    assert patience_for(0.0) == SHORTEST_WAIT_S
    assert patience_for(60.0) == LONGEST_PATIENCE_S
