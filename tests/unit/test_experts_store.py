"""Which experts become resident for a placement, and which placements an instance cannot take."""

from collections.abc import Iterable

import pytest

from services.experts.store import ExpertStore, StoreRefusal, homes_here
from tests.unit.toy_experts import EXPERTS, LAYERS, everywhere, make_placement, round_robin


class Shelf:
    """A layer that remembers what was loaded."""

    nbytes = 0

    def __init__(self) -> None:
        self.resident: frozenset[int] = frozenset()
        self.loads: list[list[int]] = []

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


def test_the_homes_of_this_instance_become_resident(shelves):
    made = store(shelves, name="e1")
    made.load(make_placement(round_robin(2), ["e0", "e1"]))
    assert all(shelf.resident == {1, 3, 5} for shelf in shelves.values())
    assert made.replicas == 6


def test_what_is_resident_is_not_loaded_again(shelves):
    made = store(shelves)
    made.load(make_placement(round_robin(2), ["e0", "e1"]))
    made.load(make_placement(everywhere(2), ["e0", "e1"], version=2))
    assert shelves[LAYERS[0]].loads == [[0, 2, 4], [1, 3, 5]]


def test_old_homes_are_let_go_when_no_placement_wants_them(shelves):
    made = store(shelves)
    first = make_placement(everywhere(2), ["e0", "e1"])
    second = make_placement(round_robin(2), ["e0", "e1"], version=2)
    made.load(first)
    made.keep_only([first, second])
    assert shelves[LAYERS[0]].resident == set(range(EXPERTS))
    made.keep_only([second])
    assert shelves[LAYERS[0]].resident == {0, 2, 4}
    made.keep_only([])
    assert made.replicas == 0


def test_more_homes_than_slots_are_refused_with_both_numbers(shelves):
    with pytest.raises(StoreRefusal, match="12 replicas, it has 11 slots"):
        store(shelves, slots=11).check(make_placement(everywhere(1), ["e0"]))
    store(shelves, slots=12).check(make_placement(everywhere(1), ["e0"]))


def test_two_placements_fit_when_their_union_does(shelves):
    first, second = (
        make_placement(homes, ["e0", "e1"]) for homes in (round_robin(2), [[1 - e % 2] for e in range(EXPERTS)])
    )
    assert store(shelves, slots=12).fits([first, second])
    assert not store(shelves, slots=11).fits([first, second])
    assert store(shelves).fits([first, second])


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
