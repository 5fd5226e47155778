"""Who is asked: suspects are left out as far as every expert keeps a live home."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from services.attention.targets import covers, live_mask

masks = st.lists(st.integers(0, 31), min_size=1, max_size=6).map(lambda m: np.array(m, np.uint64))


def test_a_suspect_that_others_replace_is_left_out():
    assert live_mask(0b111, [0b010], np.array([0b011, 0b110], np.uint64)) == 0b101


def test_a_suspect_with_a_sole_home_is_still_asked():
    assert live_mask(0b111, [0b010], np.array([0b010, 0b110], np.uint64)) == 0b111


def test_of_two_suspects_the_one_that_failed_last_is_left_out():
    """So the two homes of an expert are tried in turn, and the one that has recovered is found."""
    both = np.array([0b11], np.uint64)
    assert live_mask(0b11, [0b01, 0b10], both) == 0b10
    assert live_mask(0b11, [0b10, 0b01], both) == 0b01


def test_nobody_is_asked_while_an_expert_has_no_home():
    assert live_mask(0b01, [], np.array([0b01, 0b10], np.uint64)) == 0


@settings(deadline=None)
@given(masks, st.integers(0, 31), st.permutations([1, 2, 4, 8, 16]).map(lambda bits: bits[:3]))
def test_the_mask_covers_all_and_cannot_lose_another_suspect(homes, present, suspects):
    live = live_mask(present, suspects, homes)
    if not covers(present, homes):
        assert live == 0
        return
    assert covers(live, homes)
    assert live & ~present == 0
    assert present & ~live & ~sum(suspects) == 0, "only suspects are left out"
    assert not any(bit & live and covers(live & ~bit, homes) for bit in suspects)
