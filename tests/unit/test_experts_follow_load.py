"""The slow loop: what is foreseen becomes homes that even out loads, within memory, and only where that pays."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from services.experts.foresight import LoadSums
from services.scheduler.foresight import OLDEST_S, ROW, SILENT_S, Foresight
from services.scheduler.rebalance import Costs, Move
from services.scheduler.scaler import samples_of
from services.scheduler.scaling import Room, Traffic, busiest, followed, layer_homes
from shared.errors import BadMessage
from shared.load_messages import Foreseen
from shared.messages import Placement
from shared.placement.homes import to_masks, to_residents

LAYER = 3
COSTS = Costs(replica_bytes=1_000_000, load_rate=1e9, expert_s=1e-3)


def foreseen(loads: list[float], exchanges: int = 1, instance: str = "a", layer: int = LAYER) -> Foreseen:
    sums = np.stack([np.zeros(len(loads)), loads]).astype("<f4")
    return Foreseen(
        instance=instance, incarnation=1, layer=layer, experts=len(loads), exchanges=exchanges, sums=sums.tobytes()
    )


def placed(residents: np.ndarray) -> Placement:
    """Of one layer."""
    homes = to_masks(residents)[None].astype("<u8").tobytes()
    names = tuple("abcdefgh"[: len(residents)])
    of = {"digest": "d", "instances": names, "moe_layers": (LAYER,), "experts": residents.shape[1]}
    return Placement(version=1, epoch=1, author="", reason="", homes=homes, **of)


def phases(decode: list[float], prefill: list[float], exchanges: int = 9, prompts: int = 1) -> Foreseen:
    """A report of both: so many exchanges in all, and of prompts among them; loads of all exchanges of each."""
    both = [np.stack([np.zeros(len(of)), of]).astype("<f4") for of in (np.add(decode, prefill), np.array(prefill))]
    of = {"instance": "a", "incarnation": 1, "layer": LAYER, "experts": len(decode), "exchanges": exchanges}
    return Foreseen(**of, sums=both[0].tobytes(), prefill_exchanges=prompts, prefill_sums=both[1].tobytes())


def moves_for(loads: np.ndarray, residents: np.ndarray, room: Room, rate: float = 100.0) -> list[Move]:
    return moves_of([Traffic(loads, rate)], residents, room)


def moves_of(traffic: list[Traffic], residents: np.ndarray, room: Room) -> list[Move]:
    return followed(placed(residents), lambda layer: traffic, room, COSTS)


def homes_after(moves: list[Move], instances: int) -> np.ndarray:
    return to_residents(moves[0].homes, instances)


# ---- what is known of loads ------------------------------------------------------------------------------


def test_sums_are_taken_once_and_say_how_likely_an_expert_is_called() -> None:
    sums = LoadSums(layers=2, experts=2)
    sums.add(1, np.array([0.0, 2.0], np.float32))
    sums.add(1, np.array([1.0, 0.0], np.float32))
    [taken] = sums.take()
    assert (taken.layer, taken.exchanges) == (1, 2)
    np.testing.assert_allclose(taken.sums, [[1, 2], [1 - np.exp(-1), 1 - np.exp(-2)]], rtol=1e-6)
    assert sums.take() == []


def test_sums_of_prefill_are_told_beside_those_of_all_exchanges() -> None:
    sums = LoadSums(layers=2, experts=2)
    sums.add(0, np.array([1.0, 0.0], np.float32))
    sums.add(0, np.array([8.0, 4.0], np.float32), prefill=True)
    sums.add(1, np.array([1.0, 1.0], np.float32))
    mixed, decode = sums.take()
    assert (mixed.exchanges, mixed.prefill_exchanges) == (2, 1)
    assert mixed.sums[0].tolist() == [9, 4]
    assert mixed.prefill_sums[0].tolist() == [8, 4]
    assert (decode.exchanges, decode.prefill_exchanges) == (1, 0)
    assert not decode.prefill_sums.any()


def test_decode_and_prefill_are_alike_unless_they_are_to_be_looked_at_apart() -> None:
    alike, apart = Foresight(), Foresight(apart=True)
    for foresight in (alike, apart):
        foresight.add(phases([4.0, 0.0], [1.0, 5.0]), now=0)
    seen, decode, prefill = alike.seen(LAYER, 2, 0), apart.seen(LAYER, 2, 0), apart.seen(LAYER, 2, 0, prefill=True)
    assert alike.seen(LAYER, 2, 0, prefill=True) is None
    assert seen and seen[0].tolist() == [[5 / 9, 5 / 9]] and seen[1] == 9 / OLDEST_S
    assert decode and decode[0].tolist() == [[0.5, 0.0]] and decode[1] == 8 / OLDEST_S
    assert prefill and prefill[0].tolist() == [[1.0, 5.0]] and prefill[1] == 1 / OLDEST_S


def test_the_last_prompts_count_until_there_are_others_or_there_was_none_for_long() -> None:
    foresight = Foresight(apart=True)
    foresight.add(phases([0.0, 0.0], [1.0, 0.0], exchanges=1), now=0)
    foresight.add(phases([0.0, 0.0], [3.0, 0.0], exchanges=1), now=1)
    foresight.add(foreseen([1.0, 1.0]), now=30)
    seen = foresight.seen(LAYER, 2, now=30, prefill=True)
    assert seen and seen[0].tolist() == [[1.0, 0.0], [3.0, 0.0]]
    foresight.add(phases([0.0, 0.0], [0.0, 1.0], exchanges=1), now=40)
    seen = foresight.seen(LAYER, 2, now=40, prefill=True)
    assert seen and seen[0].tolist() == [[0.0, 1.0]]
    foresight.add(foreseen([1.0, 1.0]), now=40 + SILENT_S)
    assert foresight.seen(LAYER, 2, now=40.1 + SILENT_S, prefill=True) is None
    assert foresight.seen(LAYER, 2, now=40.1 + SILENT_S) is not None


def test_the_instance_that_foresaw_most_exchanges_stands_for_the_layer() -> None:
    foresight = Foresight()
    foresight.add(foreseen([2.0, 0.0], exchanges=2, instance="a"), now=0)
    foresight.add(foreseen([0.0, 6.0], exchanges=8, instance="b"), now=0)
    foresight.add(foreseen([9.0, 9.0], exchanges=9, layer=LAYER + 1), now=0)
    seen = foresight.seen(LAYER, 2, now=0)
    assert seen is not None
    loads, rate = seen
    assert loads.tolist() == [[0.0, 0.75]]
    assert rate == 8 / OLDEST_S


def test_rows_weigh_less_than_reading_an_expert() -> None:
    foresight, sums = Foresight(), np.array([[10, 0], [1, 1]], "<f4")
    of = {"instance": "a", "incarnation": 1, "layer": LAYER, "experts": 2, "exchanges": 1}
    foresight.add(Foreseen(**of, sums=sums.tobytes()), now=0)
    seen = foresight.seen(LAYER, 2, now=0)
    assert seen and seen[0].tolist() == [[1 + 10 * ROW, 1]]


def test_old_reports_and_those_of_another_model_do_not_count() -> None:
    foresight = Foresight()
    foresight.add(foreseen([1.0, 1.0]), now=0)
    assert foresight.seen(LAYER, 3, now=0) is None
    assert foresight.seen(LAYER, 2, now=OLDEST_S + 0.1) is None


@pytest.mark.parametrize("sums", [b"", b"1234", np.full(4, np.nan, "<f4").tobytes(), np.full(4, -1, "<f4").tobytes()])
def test_a_damaged_report_is_refused(sums: bytes) -> None:
    message = Foreseen(instance="a", incarnation=1, layer=LAYER, experts=2, exchanges=1, sums=sums)
    with pytest.raises(BadMessage, match="Foreseen"):
        Foresight().add(message, now=0)


def test_a_damaged_part_of_prefill_is_refused_and_nothing_of_its_report_kept() -> None:
    foresight, whole = Foresight(apart=True), phases([1.0, 1.0], [1.0, 1.0])
    with pytest.raises(BadMessage, match="Foreseen"):
        foresight.add(whole.model_copy(update={"prefill_sums": b"1234"}), now=0)
    assert foresight.seen(LAYER, 2, now=0) is None


# ---- homes -----------------------------------------------------------------------------------------------


def test_without_memory_to_spare_experts_change_places_and_keep_one_home() -> None:
    loads, before = np.array([[1.0, 1, 1, 1, 0, 0, 0, 0]]), np.zeros((2, 8), np.bool_)
    before[0, :4] = before[1, 4:] = True
    [move] = moves = moves_for(loads, before, Room(slots=(2, 2), layers=1))
    after = homes_after(moves, 2)
    assert (after.sum(axis=0) == 1).all()
    assert (move.before, move.after) == (4.0, 2.0)


def test_with_memory_to_spare_the_busiest_expert_gets_another_home() -> None:
    loads, before = np.array([[1.0, 0.1, 0.1, 0.1]]), np.array([[1, 1, 0, 0], [0, 0, 1, 1]], np.bool_)
    moves = moves_for(loads, before, Room(slots=(3, 3), layers=1))
    assert homes_after(moves, 2)[:, 0].all()


def test_what_is_even_stays_as_it_is() -> None:
    before = np.tile(np.eye(2, dtype=np.bool_), 4)
    assert moves_for(np.ones((3, 8)), before, Room(slots=(4, 4), layers=1)) == []


def test_homes_that_are_rarely_used_do_not_pay_for_their_loading() -> None:
    loads, before = np.array([[1.0, 1, 0, 0]]), np.array([[1, 1, 0, 0], [0, 0, 1, 1]], np.bool_)
    room = Room(slots=(4, 4), layers=1)
    assert moves_for(loads, before, room, rate=10.0)
    assert not moves_for(loads, before, room, rate=1e-3)


def test_homes_that_do_not_help_any_more_are_given_up() -> None:
    before, loads = np.ones((2, 8), np.bool_), np.array([[1.0, 1, 1, 1, 0.1, 0.1, 0.1, 0.1]])
    moves = moves_for(loads, before, Room(slots=(8, 8), layers=1))
    after = homes_after(moves, 2)
    assert (after[:, 4:].sum(axis=0) == 1).all()
    assert after[:, :4].all(), "what would hold the layer up keeps its homes"


def test_instances_of_unequal_memory_get_as_many_homes_as_fit() -> None:
    rng = np.random.default_rng(0)
    before = np.zeros((3, 64), np.bool_)
    before[rng.integers(2, size=64), np.arange(64)] = True
    room = Room(slots=(1664, 1664, 208), layers=26)
    after = layer_homes([Traffic(rng.random((4, 64)) ** 4)], before, room)
    assert after.any(axis=0).all()
    assert (after.sum(axis=1) <= np.maximum(room.of_instances(int(after.sum())), before.sum(axis=1))).all()


def test_what_only_noise_has_made_busy_stays_where_it_is() -> None:
    """Popularity is even; every look sees other samples of it."""
    rng, before = np.random.default_rng(1), np.tile(np.eye(4, dtype=np.bool_), 16)
    looks = [samples_of(rng.random((128, 64)) < 0.2) for _ in range(20)]
    moved = [moves_for(loads, before, Room(slots=(16,) * 4, layers=1)) for loads in looks]
    assert sum(map(bool, moved)) <= 5


def test_no_expert_gets_a_home_where_it_cannot_be_started() -> None:
    loads, before = np.array([[1.0, 1, 0, 0]]), np.array([[1, 1, 0, 0], [0, 0, 1, 1]], np.bool_)
    room = Room(slots=(4, 4), layers=1)
    assert moves_for(loads, before, room)
    broken = tuple((LAYER, expert) for expert in range(4))
    assert not moves_for(loads, before, Room(slots=(4, 4), layers=1, broken=((), broken)))
    other = tuple((LAYER + 1, expert) for expert in range(4))
    assert moves_for(loads, before, Room(slots=(4, 4), layers=1, broken=((), other)))


def test_an_instance_that_comes_back_with_another_model_is_heard_anew() -> None:
    foresight = Foresight()
    foresight.add(foreseen([1.0, 1.0]), now=0)
    foresight.add(foreseen([1.0, 0.0, 0.0]), now=1)
    foresight.add(foreseen([1.0, 0.0, 0.0]), now=2)
    seen = foresight.seen(LAYER, 3, now=2)
    assert seen and seen[0].shape == (2, 3)


def test_a_target_time_is_met_with_the_fewest_homes_that_do() -> None:
    loads = np.array([[4.0, 1, 1, 1, 1, 1, 1, 1]])
    before = np.tile(np.eye(2, dtype=np.bool_), 4)
    room = Room(slots=(8, 8), layers=1)
    even, loose, never = (layer_homes([Traffic(loads, target=target)], before, room) for target in (0, 6.5, 1.0))
    assert busiest(loads, loose) <= 6.5 and loose.sum() <= even.sum()
    assert busiest(loads, never) <= busiest(loads, even) + 1e-9


def test_a_target_time_that_is_met_changes_nothing() -> None:
    before = np.array([[1, 1, 1, 0], [0, 0, 0, 1]], np.bool_)
    room = Room(slots=(4, 4), layers=1)
    assert (layer_homes([Traffic(np.ones((1, 4)), target=3.0)], before, room) == before).all()


DECODE, PREFILL = np.array([[10.0, 1, 1, 1, 1, 1, 1, 1]]), np.array([[2.0, 2, 2, 2, 2, 2, 2, 20]])
APART = np.array([[1, 0, 1, 0, 1, 0, 1, 0], [0, 1, 0, 1, 0, 1, 0, 1]], np.bool_)


def test_homes_meet_the_targets_of_both_phases_and_are_fewer_for_one_of_them_alone() -> None:
    room = Room(slots=(8, 8), layers=1)
    decode, prefill = Traffic(DECODE, 50, target=9.1), Traffic(PREFILL, 1, target=18.5)
    both = layer_homes([decode, prefill], APART, room)
    assert busiest(DECODE, both) <= 9.1
    assert busiest(PREFILL, both) <= 18.5
    for traffic in ([decode, Traffic(PREFILL, 1, target=99.0)], [decode]):
        fewer = layer_homes(traffic, APART, room)
        assert busiest(DECODE, fewer) <= 9.1
        assert fewer.sum() < both.sum()


def test_a_phase_without_a_target_gets_homes_as_even_as_they_can_be() -> None:
    room = Room(slots=(16, 16), layers=1)
    even = layer_homes([Traffic(DECODE)], APART, room)
    open_end = layer_homes([Traffic(DECODE, 1e6), Traffic(PREFILL, 1.0, target=99.0)], APART, room)
    aimed = layer_homes([Traffic(DECODE, target=10.5), Traffic(PREFILL, target=99.0)], APART, room)
    assert busiest(DECODE, open_end) == pytest.approx(busiest(DECODE, even))
    assert aimed.sum() < open_end.sum()


def test_few_prompts_beyond_their_target_are_reason_enough_for_other_homes() -> None:
    """The mean over all exchanges would hardly change."""
    decode = np.ones((2, 8)) / 8
    prefill, before = np.array([[9.0, 9, 1, 1, 1, 1, 1, 1]] * 2), np.repeat(np.eye(2, dtype=np.bool_), 4, axis=1)
    room = Room(slots=(4, 4), layers=1)
    assert not moves_of([Traffic(decode, 1e4), Traffic(prefill, 1.0)], before, room)
    [move] = moves_of([Traffic(decode, 1e4, target=1.0), Traffic(prefill, 1.0, target=15.0)], before, room)
    assert (move.before, move.after) == (20.0, 12.0)


def test_homes_that_one_phase_needs_are_not_given_up_for_the_other() -> None:
    room, everywhere = Room(slots=(16, 16), layers=1), np.ones((2, 8), np.bool_)
    decode = Traffic(np.array([[0.5, 0, 0, 0, 0, 0, 0, 0]]), 50, target=1.0)
    prefill = np.array([[9.0, 6, 6, 6, 2, 2, 2, 2]])
    loose, tight = (
        homes_after(moves_of([decode, Traffic(prefill, 1, target=target)], everywhere, room), 2)
        for target in (99.0, 17.6)
    )
    assert loose.sum() == 8
    assert busiest(prefill, tight) <= 17.6
    assert 8 < tight.sum() < 16


@st.composite
def cases(draw: st.DrawFn) -> tuple[list[Traffic], np.ndarray, Room]:
    instances, experts = draw(st.integers(1, 6)), draw(st.integers(2, 16))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    traffic = [
        Traffic(
            rng.random((draw(st.integers(1, 5)), experts)) ** draw(st.sampled_from([0.5, 1, 4])),
            draw(st.sampled_from([0.1, 90.0])),
            draw(st.sampled_from([0.0, 0.5, experts / 2])),
        )
        for _ in range(draw(st.integers(1, 2)))
    ]
    before = rng.random((instances, experts)) < 0.4
    before[rng.integers(instances, size=experts), np.arange(experts)] = True
    slots = tuple(rng.integers(1, experts + 1, instances).tolist())
    return traffic, before, Room(slots, layers=1)


@settings(max_examples=150, deadline=None)
@given(cases())
def test_every_expert_keeps_a_home_and_memory_is_not_exceeded(case: tuple[list[Traffic], np.ndarray, Room]) -> None:
    traffic, before, room = case
    after = layer_homes(traffic, before, room)
    assert after.any(axis=0).all()
    if (after != before).any():
        assert after.sum() <= room.homes(before.shape[1])
