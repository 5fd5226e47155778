"""Spans of traced requests inside the engine: queue, prefill and decode, as children of the request's own span.

Belongs to the compute thread. A request that was preempted is prefilled again, and shows that.
"""

import time
from collections.abc import Callable
from typing import Literal

from services.attention.sequence import Sequence, Trace
from shared.telemetry import NO_TRACE

Phase = Literal["queue", "prefill", "decode"]
Record = Callable[[str, Trace, int, int], None]
"""(name, trace and span id of the parent, start and end in ns of ``time.time_ns``): notes a span that is over."""


def ignore(name: str, trace: Trace, start_ns: int, end_ns: int) -> None:
    """For an engine whose spans nobody wants."""


class Phases:
    """What each traced request does now, and since when. Costs a comparison for the others."""

    def __init__(self, record: Record) -> None:
        self._record = record
        self._now: dict[str, tuple[Phase, int]] = {}

    def enter(self, sequence: Sequence, phase: Phase, ago_s: float = 0.0) -> None:
        """A request begins a phase, or began it ``ago_s`` seconds ago; the one before ends. Repeats change nothing."""
        if sequence.trace == NO_TRACE or self._now.get(sequence.request_id, ("", 0))[0] == phase:
            return
        at = time.time_ns() - int(ago_s * 1e9)
        self._close(sequence, at)
        self._now[sequence.request_id] = phase, at

    def end(self, sequence: Sequence) -> None:
        """The request is over."""
        if sequence.trace != NO_TRACE:
            self._close(sequence, time.time_ns())

    def _close(self, sequence: Sequence, at: int) -> None:
        phase, since = self._now.pop(sequence.request_id, ("", at))
        if phase:
            self._record(f"attention.{phase}", sequence.trace, since, at)
