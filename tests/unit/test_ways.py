"""The cost table: what links alone say about ways, which ways are tried, and how trials, drift and settings decide."""

import itertools

import pytest

from services.attention.ways import (
    DRIFT,
    FINAL,
    MOST_SIZES,
    NEAR,
    ROUNDS,
    SOLO,
    TRIAL_EVERY,
    UNDISTURBED,
    Gate,
    Link,
    Node,
    Phase,
    Shape,
    Way,
    Ways,
    link_of,
    predict,
    ways_for,
)

DEAR = Link(200e-6, 100e-6, 8 / 1e9)
"""1 Gbit/s, 100 us of the sender per message."""
QUICK = Link(5e-6, 1e-6, 1 / 1e11)
ONE, DIRECT, RELAY = (Way(phase) for phase in Phase)


def shape(rows: int = 16, members: int = 4, nodes: int = 2, instances: int = 4, link: Link = DEAR) -> Shape:
    return Shape(rows, members, (Node(instances, link, near=link is NEAR),) * nodes, 1024, 8, NEAR)


def tried(ways: Ways, of: Shape) -> list[Way]:
    """Its candidates."""
    ways.choose(of)
    return [row.way for row in ways.table()]


def settle(ways: Ways, of: Shape, seconds: dict[Way, float], steps: int = UNDISTURBED + 6 * FINAL) -> list[Way]:
    """Run so many steps that take what ``seconds`` says; returns the way of each."""
    taken = []
    for _ in range(steps):
        way = ways.choose(of)
        taken.append(way)
        ways.observe(of, way, seconds[way])
    return taken


# ---- what links say -----------------------------------------------------------------------------------------


def test_a_leader_beats_every_member_for_itself_where_messages_are_expensive():
    assert predict(DIRECT, shape()) < predict(ONE, shape())


def test_a_relay_beats_many_copies_of_the_same_rows_over_a_shared_link():
    assert predict(RELAY, shape(rows=64)) < predict(DIRECT, shape(rows=64)) < predict(ONE, shape(rows=64))


def test_a_relay_does_not_pay_where_links_between_nodes_are_as_good_as_inside():
    assert predict(DIRECT, shape(link=QUICK)) < predict(RELAY, shape(link=QUICK))


def test_one_phase_wins_where_going_through_a_leader_costs_more_than_it_saves():
    slow_inside = shape(rows=256, link=QUICK, instances=1)._replace(inside=Link(1e-3, 1e-3, 1 / 1e8))
    assert predict(ONE, slow_inside) < predict(DIRECT, slow_inside)


def test_gating_here_saves_bytes_of_many_rows_and_costs_time_for_few():
    here = Way(Phase.DIRECT, Gate.ATTENTION)
    many, few = (shape(rows, members=1, instances=16)._replace(top_k=1) for rows in (512, 1))
    assert predict(here, many) < predict(DIRECT, many)
    assert predict(here, few._replace(nodes=(Node(2, NEAR, True),))) > predict(DIRECT, few._replace(nodes=()))


@pytest.mark.parametrize("way", list(itertools.starmap(Way, itertools.product(Phase, Gate))), ids=str)
def test_every_way_has_a_cost_that_grows_with_rows(way):
    costs = [predict(way, shape(rows)) for rows in (1, 8, 64, 512)]
    assert costs == sorted(costs)
    assert costs[0] > 0


def test_an_exchange_without_a_live_expert_has_a_way_nevertheless():
    """It ends as unavailable; choosing its way must not end the process."""
    assert Ways().choose(shape()._replace(nodes=(), members=1)) == SOLO
    assert Ways().choose(shape()._replace(nodes=())).gate in Gate


def test_a_link_is_what_round_trips_bursts_and_bulk_say():
    latency, occupancy, per_byte = 1e-3, 1e-4, 1e-8
    alone = 2 * (latency + occupancy)
    measured = link_of([alone, alone * 2], [(8, alone + 7 * occupancy)], [(10**6, alone + 10**6 * per_byte)])
    assert measured == pytest.approx((latency, occupancy, per_byte))
    assert link_of([1.0], [(8, 0.5)], [(100, 0.5)]) == (0.5, 0.0, 0.0)


# ---- which ways there are -----------------------------------------------------------------------------------


def test_ways_that_cannot_differ_are_not_offered():
    assert {way.phase for way in ways_for(shape(members=1, nodes=1, link=NEAR))} == {Phase.DIRECT}
    assert {way.phase for way in ways_for(shape(members=2, link=NEAR))} == {Phase.ONE, Phase.DIRECT}
    assert {way.phase for way in ways_for(shape(members=1))} == {Phase.DIRECT, Phase.RELAY}
    assert {way.phase for way in ways_for(shape(members=1, instances=1))} == {Phase.DIRECT}
    assert {way.phase for way in ways_for(shape())} == set(Phase)


@pytest.mark.parametrize("gate", [None, *Gate])
@pytest.mark.parametrize("phase", [None, *Phase])
@pytest.mark.parametrize("members", [1, 3])
@pytest.mark.parametrize("link", [NEAR, DEAR], ids=["near", "far"])
def test_fixed_settings_are_honoured_as_far_as_they_make_a_difference(phase, gate, members, link):
    ways, of = Ways(phase, gate), shape(members=members, link=link)
    for _ in range(UNDISTURBED + 6 * FINAL):
        way = ways.choose(of)
        assert gate in (None, way.gate)
        if phase in {w.phase for w in ways_for(of)}:
            assert way.phase is phase
        ways.observe(of, way, 1e-3)
    if phase and gate:
        assert len({row.way for row in ways.table()}) == 1


def test_one_instance_whose_experts_are_near_has_nothing_to_try():
    ways, of = Ways(), shape(members=1, link=NEAR, nodes=1)
    assert set(settle(ways, of, {SOLO: 1e-3}, 50)) == {SOLO}


# ---- trials -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fastest", range(4))
def test_a_trial_converges_to_what_is_fastest_whatever_was_estimated(fastest):
    ways, of = Ways(), shape()
    candidates = tried(ways, of)
    assert len(candidates) > 3
    seconds = dict.fromkeys(candidates, 0.002) | {candidates[fastest]: 1e-3}
    settle(ways, of, seconds)
    assert settle(ways, of, seconds, 5) == [candidates[fastest]] * 5
    chosen = [row for row in ways.table() if row.chosen]
    assert [(row.way, row.measured) for row in chosen] == [(candidates[fastest], 1e-3)]


def test_every_candidate_is_tried_and_those_that_are_close_go_on_to_the_final():
    ways, of = Ways(), shape()
    first, second, *slow = tried(ways, of)
    seconds = {first: 1e-3, second: 1.1e-3} | dict.fromkeys(slow, 2e-3)
    trial = settle(ways, of, seconds, UNDISTURBED + 2 * FINAL + len(slow) * ROUNDS)[UNDISTURBED:]
    assert {way: trial.count(way) for way in seconds} == {first: FINAL, second: FINAL} | dict.fromkeys(slow, ROUNDS)
    assert settle(ways, of, seconds, 5) == [first] * 5


def test_a_hiccup_in_the_first_rounds_is_made_good_in_the_final():
    """Three steps of a candidate are few: the way that is faster in the end had two slow ones among them."""
    ways, of = Ways(), shape()
    first, second, *slow = tried(ways, of)
    steps = dict.fromkeys((first, second, *slow), 0)
    for _ in range(UNDISTURBED + 6 * FINAL):
        way = ways.choose(of)
        steps[way] += ways._size(of).in_trial
        early = way == first and steps[way] <= ROUNDS
        ways.observe(of, way, {first: 1.2e-3 if early else 1e-3, second: 1.1e-3}.get(way, 2e-3))
    assert ways.choose(of) == first


def test_a_way_that_fails_every_time_ends_its_trial_and_is_not_taken():
    """Its steps take as long as their repeats do."""
    ways, of = Ways(), shape()
    first, *others = tried(ways, of)
    seconds = {first: 2.0} | dict.fromkeys(others, 1e-3)
    settle(ways, of, seconds)
    assert first not in settle(ways, of, seconds, 20)


def test_what_another_table_chose_is_not_counted_here():
    ways, of = Ways(phase=Phase.DIRECT), shape()
    mine = ways.choose(of)
    candidates = tried(ways, of)
    strange = next(way for way in itertools.starmap(Way, itertools.product(Phase, Gate)) if way not in candidates)
    for _ in range(UNDISTURBED):
        ways.observe(of, mine, 1e-3)
    ways.observe(of, strange, 1e-9)
    settle(ways, of, dict.fromkeys(candidates, 1e-3))
    assert tried(ways, of) == candidates
    assert all(row.measured == 1e-3 for row in ways.table())


def test_a_way_that_only_others_choose_in_a_trial_takes_no_memory():
    ways, of = Ways(), shape()
    way = ways.choose(of)
    for _ in range(10_000):
        ways.observe(of, way, 1e-3)
    [size] = ways._sizes.values()
    assert sum(map(len, size.times.values())) <= FINAL


def in_trial(ways: Ways, of: Shape, way: Way, seconds: float, steps: int) -> bool:
    """Whether steps that take so long lead to another trial."""
    for _ in range(steps):
        ways.observe(of, way, seconds)
        if ways._size(of).in_trial:
            return True
    return False


@pytest.mark.parametrize(("factor", "again"), [(1.1, False), (0.9, False), (2 * DRIFT, True), (0.4 / DRIFT, True)])
def test_lasting_drift_starts_another_trial_and_noise_does_not(factor, again):
    ways, of = Ways(), shape()
    settle(ways, of, dict.fromkeys(tried(ways, of), 1e-3))
    best = ways.choose(of)
    assert in_trial(ways, of, best, factor * 1e-3, 50) is again


def test_one_hiccup_starts_no_trial():
    ways, of = Ways(), shape()
    settle(ways, of, dict.fromkeys(tried(ways, of), 1e-3))
    way = ways.choose(of)
    assert not in_trial(ways, of, way, 5.0, 1)
    assert not in_trial(ways, of, way, 1e-3, 50)


def test_a_trial_is_repeated_now_and_then():
    ways, of = Ways(), shape()
    settle(ways, of, dict.fromkeys(tried(ways, of), 1e-3))
    way = ways.choose(of)
    assert not in_trial(ways, of, way, 1e-3, TRIAL_EVERY - 6 * FINAL - 10)  # settle has gone on after the first one
    assert in_trial(ways, of, way, 1e-3, 6 * FINAL + 20)


def test_sizes_are_powers_of_two_and_decided_apart():
    ways = Ways()
    for rows in (1, 2, 3, 4, 5, 8):
        ways.choose(shape(rows))
    assert {row.rows for row in ways.table()} == {1, 2, 4, 8}


def test_the_table_names_each_size_once_however_often_instances_came_and_went():
    """Metrics must not repeat a label set; and memory is bounded."""
    ways = Ways()
    for instances in range(1, MOST_SIZES + 50):
        ways.choose(shape(instances=instances))
    labels = [(row.rows, row.members, row.way) for row in ways.table()]
    assert len(labels) == len(set(labels)) <= 3
    assert len(ways._sizes) == MOST_SIZES
    latest = shape(instances=MOST_SIZES + 40)
    ways.choose(latest)
    assert ways.table()[0].predicted == pytest.approx(min(predict(way, latest) for way in ways_for(latest)))


def test_forgetting_starts_afresh():
    ways, of = Ways(), shape()
    ways.choose(of)
    ways.forget()
    assert not ways.table()
