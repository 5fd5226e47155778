"""The slow loop: what is foreseen becomes homes that even out loads, within memory, and only where that pays."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from services.experts.foresight import LoadSums
from services.scheduler.foresight import OLDEST_S, ROW, Foresight
from services.scheduler.rebalance import Costs, Move
from services.scheduler.scaler import samples_of
from services.scheduler.scaling import Room, busiest, followed, layer_homes
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


def moves_for(loads: np.ndarray, residents: np.ndarray, room: Room, rate: float = 100.0) -> list[Move]:
    return followed(placed(residents), lambda layer: (loads, rate), room, COSTS)


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
    after = layer_homes(rng.random((4, 64)) ** 4, before, room)
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
    even = layer_homes(loads, before, Room(slots=(8, 8), layers=1))
    loose = layer_homes(loads, before, Room(slots=(8, 8), layers=1, target=6.5))
    never = layer_homes(loads, before, Room(slots=(8, 8), layers=1, target=1.0))
    assert busiest(loads, loose) <= 6.5 and loose.sum() <= even.sum()
    assert busiest(loads, never) <= busiest(loads, even) + 1e-9


def test_a_target_time_that_is_met_changes_nothing() -> None:
    before = np.array([[1, 1, 1, 0], [0, 0, 0, 1]], np.bool_)
    room = Room(slots=(4, 4), layers=1, target=3.0)
    assert (layer_homes(np.ones((1, 4)), before, room) == before).all()


@st.composite
def cases(draw: st.DrawFn) -> tuple[np.ndarray, np.ndarray, Room]:
    instances, experts = draw(st.integers(1, 6)), draw(st.integers(2, 16))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    loads = rng.random((draw(st.integers(1, 5)), experts)) ** draw(st.sampled_from([0.5, 1, 4]))
    before = rng.random((instances, experts)) < 0.4
    before[rng.integers(instances, size=experts), np.arange(experts)] = True
    slots = tuple(rng.integers(1, experts + 1, instances).tolist())
    target = draw(st.sampled_from([0.0, 0.5, experts / 2]))
    return loads, before, Room(slots, layers=1, target=target)


@settings(max_examples=150, deadline=None)
@given(cases())
def test_every_expert_keeps_a_home_and_memory_is_not_exceeded(case: tuple[np.ndarray, np.ndarray, Room]) -> None:
    loads, before, room = case
    after = layer_homes(loads, before, room)
    assert after.any(axis=0).all()
    if (after != before).any():
        assert after.sum() <= room.homes(loads.shape[1])
