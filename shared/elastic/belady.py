"""The fewest calls that can wait when residents are started only once they are called: a yardstick.

Belady's rule (IBM Systems Journal 5, 1966): who is needed last makes room. Nobody can do better with the same slots
without starting experts before they are called.
"""

from collections.abc import Sequence
from heapq import heappop, heappush

NEVER = 1 << 62


def fewest_waits(exchanges: Sequence[tuple[int, Sequence[int]]], slots: int) -> int:
    """Calls that wait out of all of ``exchanges``: (layer, experts called), with ``slots`` shared by all layers.

    The experts of one exchange may be called one after the other, so that there may be more of them than slots.
    """
    calls = [(layer, expert) for layer, experts in exchanges for expert in experts]
    following = _next_calls(calls)
    resident: dict[tuple[int, int], int] = {}
    """Expert -> when it is called next."""
    latest: list[tuple[int, tuple[int, int]]] = []
    """Heap of (-next call, expert), with outdated entries in between."""
    waits = 0
    for call, soon in zip(calls, following, strict=True):
        if call not in resident:
            waits += 1
            if len(resident) >= slots:
                del resident[_last(latest, resident)]
        resident[call] = soon
        heappush(latest, (-soon, call))
    return waits


def _next_calls(calls: Sequence[tuple[int, int]]) -> list[int]:
    """When each call's expert is called again."""
    following, seen = [NEVER] * len(calls), dict[tuple[int, int], int]()
    for i in range(len(calls) - 1, -1, -1):
        following[i] = seen.get(calls[i], NEVER)
        seen[calls[i]] = i
    return following


def _last(latest: list[tuple[int, tuple[int, int]]], resident: dict[tuple[int, int], int]) -> tuple[int, int]:
    """The resident that is needed last."""
    while True:
        soon, expert = heappop(latest)
        if resident.get(expert) == -soon:
            return expert
