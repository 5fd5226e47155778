"""What exchanges tell a scheduler, and when it moves replicas for that; homes as a person gives them."""

from typing import Any

import numpy as np
import pytest

from services.scheduler.rebalance import Costs, Move, applied, better, given, mean_a_max
from services.scheduler.window import FEWEST_EXCHANGES, MOST_EXCHANGES, OLDEST_S, Seen, Window
from shared.errors import BadMessage
from shared.load_messages import Activated
from shared.membership import Member
from shared.messages import ExpertCosts, Heartbeat, Kind, Placement, State
from shared.placement.homes import BadPlacement

EXPERTS = 70


def message(active: np.ndarray, layer: int = 0, seconds: float = 1.0, **more: Any) -> Activated:
    """``active``: bool [exchanges, experts]."""
    padded = np.zeros((len(active), -(-active.shape[1] // 64) * 64), np.bool_)
    padded[:, : active.shape[1]] = active
    masks = np.packbits(padded, axis=1, bitorder="little").tobytes()
    fields = {"attention": "a", "incarnation": 1, "rows": 1} | more
    return Activated(layer=layer, experts=active.shape[1], seconds=seconds, masks=masks, **fields)


def some(count: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).random((count, EXPERTS)) < 0.3


def test_activity_and_co_activation_are_shares_of_the_exchanges() -> None:
    window, active = Window(), some(40)
    window.add(message(active[:20], seconds=3), now=10.0)
    window.add(message(active[20:], seconds=1), now=12.0)
    seen = window.seen(0, EXPERTS, now=15.0)
    assert seen is not None
    assert (seen.active == active).all()
    assert np.allclose(seen.activity, active.mean(axis=0))
    assert np.isclose(seen.together[3, 5], (active[:, 3] & active[:, 5]).mean())
    assert seen.rate == 40 / 8


def test_the_window_slides_by_exchanges_and_by_age() -> None:
    window = Window()
    for number in range(4):
        window.add(message(some(MOST_EXCHANGES // 2, number)), now=number)
    seen = window.seen(0, EXPERTS, now=4.0)
    assert seen is not None
    assert len(seen.active) == MOST_EXCHANGES
    assert (seen.active[-10:] == some(MOST_EXCHANGES // 2, 3)[-10:]).all()
    assert window.seen(0, EXPERTS, now=5 + OLDEST_S) is None


def test_few_exchanges_another_layer_or_another_model_tell_nothing() -> None:
    window = Window()
    window.add(message(some(FEWEST_EXCHANGES - 1)), now=0.0)
    assert window.seen(0, EXPERTS, 0.0) is None
    window.add(message(some(1)), now=0.0)
    assert window.seen(0, EXPERTS, 0.0) is not None
    assert window.seen(1, EXPERTS, 0.0) is None
    assert window.seen(0, EXPERTS + 1, 0.0) is None
    window.add(message(np.ones((1, 3), np.bool_)), now=0.0)
    assert window.seen(0, EXPERTS, 0.0) is None


def test_masks_of_a_wrong_size_are_refused() -> None:
    with pytest.raises(BadMessage, match="9 bytes of masks for 70 experts"):
        Window().add(message(some(1)).model_copy(update={"masks": bytes(9)}), 0.0)


def placement(homes: list[list[int]], instances: int = 2) -> Placement:
    """``homes[layer][expert]``: mask."""
    table = np.array(homes, "<u8")
    return Placement(
        version=1, epoch=1, author="s", reason="r", digest="aa", instances=tuple(f"e{i}" for i in range(instances)),
        moe_layers=tuple(range(10, 10 + len(table))), experts=table.shape[1], homes=table.tobytes(),
    )  # fmt: skip


def always(*experts: int, of: int = 4) -> Seen:
    """Every exchange activates the same experts."""
    active = np.zeros((20, of), np.bool_)
    active[:, experts] = True
    return Seen(active, 10.0)


def test_experts_that_are_activated_together_are_taken_apart() -> None:
    current = placement([[1, 1, 2, 2], [1, 1, 2, 2]])
    moves = better(current, {10: always(0, 1)}.get, slots=2)
    assert [(move.layer, move.before, move.after) for move in moves] == [(0, 2.0, 1.0)]
    homes = applied(current, moves)
    assert mean_a_max(always(0, 1).active, homes[0], 2) == 1
    assert homes[1].tolist() == [1, 1, 2, 2]
    assert moves[0].moved == 2


def test_nothing_moves_where_nothing_is_gained_or_known() -> None:
    current = placement([[1, 1, 2, 2]])
    assert better(current, {10: always(0, 2)}.get, slots=2) == []
    assert better(current, {}.get, slots=2) == []


def test_a_move_pays_when_exchanges_save_more_time_than_loading_takes() -> None:
    move = Move(0, np.ones(4, np.uint64), moved=2, before=4.0, after=3.0, rate=10.0)
    costs = Costs(replica_bytes=1000, load_rate=1.0, expert_s=1e-3)
    assert not move.pays(costs), "900 s x 10/s x 1 expert x 1 ms = 9 s, loading takes 2,000 s"
    assert move.pays(Costs(1000, 1e6, 1e-3))
    assert not move.pays(Costs(1000, 1e6, 0.0)), "nobody knows what an expert costs"
    assert not Move(0, np.ones(4, np.uint64), 2, 4.0, 4.0, 1e9).pays(Costs(1, 1e9, 1.0))


def test_costs_are_those_that_overstate_no_gain() -> None:
    def member(*figures: float) -> Member:
        costs = ExpertCosts(replica_bytes=int(figures[0]), load_rate=figures[1], expert_s=figures[2])
        return Member(Heartbeat(kind=Kind.EXPERTS, id="e", incarnation=1, state=State.READY, node="n", costs=costs), 0)

    assert Costs.of([member(10, 0, 2), member(20, 5, 1), member(15, 7, 0)]) == Costs(20, 5, 1)
    assert Costs.of([]) == Costs()


def test_given_homes_replace_those_of_the_layers_they_name() -> None:
    current = placement([[1, 1, 2, 2], [1, 1, 2, 2]])
    moves = given(current, {11: {"e0": [0, 2], "e1": [1, 3]}}, {}.get, slots=2)
    assert applied(current, moves).tolist() == [[1, 1, 2, 2], [1, 2, 1, 2]]
    assert [(move.moved, move.before) for move in moves] == [(2, None)]
    assert given(current, {11: {"e0": [0, 1], "e1": [2, 3]}}, {}.get, slots=2) == []


@pytest.mark.parametrize(
    ("wanted", "words"),
    [
        ({11: {"e0": [0, 1], "e1": [3]}}, "layer 11, expert 2: has no home"),
        ({11: {"e0": [0, 1, 2], "e1": [3]}}, "layer 11, expert 2: does not fit on instance 0"),
        ({11: {"e0": [0, 0], "e1": [1, 2]}}, "layer 11, expert 0: is on instance 0 twice"),
        ({11: {"e0": [0, 4], "e1": [1, 2]}}, "layer 11, expert 4: does not exist"),
    ],
)
def test_homes_that_cannot_be_served_are_refused_with_layer_and_expert(wanted: Any, words: str) -> None:
    with pytest.raises(BadPlacement, match=words):
        given(placement([[1, 1, 2, 2], [1, 1, 2, 2]]), wanted, {}.get, slots=2)


@pytest.mark.parametrize(("wanted", "words"), [({9: {"e0": [0]}}, "layer 9"), ({10: {"x": [0]}}, "x is not among")])
def test_homes_in_unknown_places_are_refused(wanted: Any, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        given(placement([[1, 1, 2, 2]]), wanted, {}.get, slots=2)
