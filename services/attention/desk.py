"""Admission, answered at once in the thread that receives requests, while the compute thread is inside a step.

Covers who is let in and which request ids are known; the queue itself is in batching.py.
"""

import threading
from collections import Counter
from collections.abc import Iterable

from services.attention.batching import Limits, refusal
from services.attention.stats import EngineStats
from shared.request_messages import Decision, Submit

ACCEPTED = Decision(ok=True)


class Desk:
    """Thread-safe. An id is known from its admission until the engine forgets it."""

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self._lock = threading.Lock()
        self._known: set[str] = set()
        self.on_the_way = 0
        """Requests that are admitted but not yet in the engine's stats."""
        self.draining = False
        self.refused: Counter[str] = Counter()
        """Refusals by code."""

    def knows(self, request_id: str) -> bool:
        return request_id in self._known

    def admit(self, request: Submit, stats: EngineStats, now: float) -> tuple[Decision, bool]:
        """The decision, and whether the request is new: a repeat of a known one is accepted and changes nothing."""
        with self._lock:
            if request.request_id in self._known:
                return ACCEPTED, False
            refused = self._closed(stats, now, request.may_wait) or refusal(request, self._limits)
            if refused is None:
                self._known.add(request.request_id)
                self.on_the_way += 1
                return ACCEPTED, True
            self.refused[refused.code or "internal"] += 1
            return refused, False

    def taken(self, count: int) -> None:
        """``count`` admitted requests are in the engine's own queue, and in its stats, by now."""
        with self._lock:
            self.on_the_way -= count

    def forget(self, request_ids: Iterable[str]) -> None:
        with self._lock:
            self._known.difference_update(request_ids)

    def _closed(self, stats: EngineStats, now: float, may_wait: bool) -> Decision | None:
        """Why nobody, or nobody who may not wait for experts, is let in right now."""
        if self.draining:
            return Decision(ok=False, code="draining", message="this instance is stopping")
        if stats.without_experts(now) and not may_wait:
            return Decision(ok=False, code="no_experts", message="some experts have no live home")
        waiting = stats.waiting + self.on_the_way
        if waiting >= self._limits.max_waiting:
            return Decision(ok=False, code="full", message=f"{waiting} requests are waiting already")
        return None
