"""The yardstick of residency against every possible way to make room, on small cases."""

import itertools
from functools import cache

import numpy as np
import pytest

from shared.elastic.belady import fewest_waits


def by_trying(calls: tuple[tuple[int, int], ...], slots: int) -> int:
    """Fewest waits over all choices of who makes room."""

    @cache
    def least(at: int, resident: frozenset[tuple[int, int]]) -> int:
        if at == len(calls):
            return 0
        call = calls[at]
        if call in resident:
            return least(at + 1, resident)
        if len(resident) < slots:
            return 1 + least(at + 1, resident | {call})
        return 1 + min(least(at + 1, resident - {gone} | {call}) for gone in resident)

    return least(0, frozenset())


@pytest.mark.parametrize("seed", range(30))
def test_nobody_makes_room_better(seed):
    rng = np.random.default_rng(seed)
    exchanges = [(step % 2, sorted(rng.choice(4, rng.integers(1, 4), replace=False).tolist())) for step in range(8)]
    calls = tuple((layer, expert) for layer, experts in exchanges for expert in experts)
    for slots in (1, 2, 4):
        assert fewest_waits(exchanges, slots) == by_trying(calls, slots)


def test_with_room_for_all_each_expert_waits_once():
    exchanges = [(layer, [0, 1, 2]) for _, layer in itertools.product(range(5), range(3))]
    assert fewest_waits(exchanges, 9) == 9
