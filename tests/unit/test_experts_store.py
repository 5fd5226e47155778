"""Which experts become resident for a placement, and which placements an instance cannot take."""

from collections.abc import Iterable

import numpy as np
import pytest

from services.experts.store import ExpertStore, StoreRefusal, homes_here
from shared.messages import Placement
from tests.unit.toy_experts import EXPERTS, LAYERS, everywhere, make_placement, round_robin


class Shelf:
    """A layer that remembers what was loaded."""

    def __init__(self) -> None:
        self.resident: frozenset[int] = frozenset()
        self.loads: list[list[int]] = []

    @property
    def nbytes(self) -> int:
        return 100 * len(self.resident)

    def load(self, experts: Iterable[int]) -> None:
        self.loads.append(sorted(experts))
        self.resident |= set(self.loads[-1])

    def unload(self, experts: Iterable[int]) -> None:
        self.resident -= set(experts)


@pytest.fixture
def shelves():
    return {layer: Shelf() for layer in LAYERS}


def store(shelves: dict[int, Shelf], slots: int = 0, name: str = "e0") -> ExpertStore:
    return ExpertStore(shelves, instance=name, slots=slots, digest="d" * 64, experts=EXPERTS)


def everyone(made: ExpertStore, *placements: Placement) -> None:
    """What an instance does with placements when slots are no matter."""
    made.keep_only(placements)
    made.load_beside(made.plan(placements))
    made.become(made.plan(placements))


def swapped(version: int = 2) -> Placement:
    """The homes of ``round_robin(2)`` on the other instance each."""
    return make_placement([[1 - e % 2] for e in range(EXPERTS)], ["e0", "e1"], version=version)


def test_the_homes_of_this_instance_become_resident(shelves):
    made = store(shelves, name="e1")
    everyone(made, make_placement(round_robin(2), ["e0", "e1"]))
    assert all(shelf.resident == {1, 3, 5} for shelf in shelves.values())
    assert made.replicas == 6


def test_what_is_resident_is_not_loaded_again(shelves):
    made = store(shelves)
    everyone(made, make_placement(round_robin(2), ["e0", "e1"]))
    everyone(made, make_placement(everywhere(2), ["e0", "e1"], version=2))
    assert shelves[LAYERS[0]].loads == [[0, 2, 4], [1, 3, 5]]


def test_old_homes_are_let_go_when_no_placement_wants_them(shelves):
    made = store(shelves)
    first = make_placement(everywhere(2), ["e0", "e1"])
    second = make_placement(round_robin(2), ["e0", "e1"], version=2)
    everyone(made, first, second)
    assert shelves[LAYERS[0]].resident == set(range(EXPERTS))
    made.keep_only([second])
    assert shelves[LAYERS[0]].resident == {0, 2, 4}
    made.keep_only([])
    assert made.replicas == 0


def test_more_homes_than_slots_are_refused_with_both_numbers(shelves):
    with pytest.raises(StoreRefusal, match="12 replicas, it has 11 slots"):
        store(shelves, slots=11).check(make_placement(everywhere(1), ["e0"]))
    store(shelves, slots=12).check(make_placement(everywhere(1), ["e0"]))


def test_with_free_slots_both_placements_can_be_answered(shelves):
    made, first = store(shelves, slots=12), make_placement(round_robin(2), ["e0", "e1"])
    everyone(made, first)
    plan = made.plan([first, swapped()])
    made.load_beside(plan)
    assert made.layers_of(first, plan) == made.layers_of(swapped(), plan) == set(LAYERS)


def test_without_free_slots_only_layers_that_have_to_make_room_lose_the_old_placement(shelves):
    """Nine slots hold three homes of the old placement in one layer beside the six new ones, not in both."""
    made, first = store(shelves, slots=9), make_placement(round_robin(2), ["e0", "e1"])
    everyone(made, first)
    plan = made.plan([first, swapped()])
    made.load_beside(plan)
    assert made.layers_of(first) == set(LAYERS), "nothing was let go of yet"
    assert made.layers_of(first, plan) == {LAYERS[0]}
    made.become(plan)
    assert made.replicas == 9
    assert made.layers_of(swapped(), plan) == set(LAYERS)


def test_nothing_is_loaded_beside_what_is_there_as_long_as_no_slot_is_free(shelves):
    """One layer grows by what another one gives up: at no time are there more replicas than slots."""
    made = store(shelves, slots=6)
    first = make_placement(round_robin(2), ["e0", "e1"])
    grows, shrinks = [1, 1, 1, 2, 1, 1], [1, 2, 2, 2, 2, 2]
    homes = np.array([grows, shrinks], "<u8").tobytes()
    second = first.model_copy(update={"version": 2, "homes": homes})
    everyone(made, first)
    plan = made.plan([first, second])
    made.load_beside(plan)
    assert made.replicas == 6
    assert shelves[LAYERS[0]].resident == {0, 2, 4}
    made.become(plan)
    assert shelves[LAYERS[0]].resident == {0, 1, 2, 4, 5}
    assert shelves[LAYERS[1]].resident == {0}


def test_an_aborted_swap_brings_the_old_homes_back(shelves):
    made, first = store(shelves, slots=6), make_placement(round_robin(2), ["e0", "e1"])
    everyone(made, first)
    everyone(made, first, swapped())
    assert made.layers_of(first) == set()
    everyone(made, first)
    assert made.layers_of(first) == set(LAYERS)
    assert made.replicas == 6


def test_loading_measures_its_speed(shelves):
    made = store(shelves)
    assert made.load_rate == 0
    everyone(made, make_placement(everywhere(1), ["e0"]))
    assert made.load_rate > 0


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"digest": "e" * 64}, "another model"),
        ({"moe_layers": (1, 2)}, "other layers or experts"),
        ({"experts": 5}, "other layers or experts"),
        ({"homes": bytes(8)}, "8 bytes of homes"),
    ],
)
def test_a_placement_of_another_shape_is_refused(shelves, change, words):
    with pytest.raises(StoreRefusal, match=words):
        store(shelves).check(make_placement(everywhere(1), ["e0"]).model_copy(update=change))


def test_a_placement_that_does_not_name_us_has_no_homes_here():
    assert homes_here(make_placement(everywhere(1), ["e0"]), "e9") == {}
