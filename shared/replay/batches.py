"""Which rows a step computes in a replay: as the engine forms batches, or as the paper does.

``EngineBatches`` is services/attention/batching.py in arrays, for a KV cache that holds everybody: by age, decodes and
prompt chunks within the limits, few prompt rows while most requests generate. ``SecondBatches`` is the paper's set-up
(MoEless, section 6.1): all requests of one second are one batch, prefilled at once and decoded until the last one ends.
"""
# ruff: noqa: ANN001, ANN202 - numba infers the types of compiled functions

from typing import NamedTuple, Protocol

import numpy as np
from numba import njit
from numpy.typing import NDArray

from shared.replay.arrivals import Arrivals
from shared.replay.inputs import Inputs

Ints = NDArray[np.int64]


class Step(NamedTuple):
    """Chunks of one step, [chunks] each: rows ``start`` to ``start + count`` of a request."""

    requests: Ints
    starts: Ints
    counts: Ints


class Batches(Protocol):
    """Forms one step after the other."""

    def next_step(self, now: float) -> Step:
        """The rows of the step that begins now; empty: nothing to do. They count as computed afterwards."""
        ...

    def next_time(self, now: float) -> float:
        """When there is something to do again, if ``next_step`` was empty; infinite: never."""
        ...


class EngineBatches:
    """Continuous batching with chunked prefill."""

    def __init__(self, arrivals: Arrivals, inputs: Inputs) -> None:
        self._arrivals, self._limits = arrivals, inputs
        self._computed = np.zeros(len(arrivals.times), np.int64)
        self._length = arrivals.context.copy()
        self._end = arrivals.context + arrivals.generated - 1  # the last token is never an input
        self._running = np.zeros(inputs.max_num_seqs, np.int64)
        self._counts = np.zeros(inputs.max_num_seqs, np.int64)
        self._active = self._admitted = 0

    def next_step(self, now: float) -> Step:
        came = int(np.searchsorted(self._arrivals.times, now, side="right"))
        limits = self._limits
        self._active, self._admitted, chunks = _schedule(
            self._running, self._active, self._admitted, came, self._length, self._computed, self._counts,
            limits.max_num_seqs, limits.max_batched_tokens, limits.mixed_prefill,
        )  # fmt: skip
        chosen = self._counts[: self._active] > 0
        requests, counts = self._running[: self._active][chosen].copy(), self._counts[: self._active][chosen].copy()
        starts = self._computed[requests].copy()
        if chunks:
            self._active = _advance(self._running, self._active, self._counts, self._length, self._computed, self._end)
        return Step(requests, starts, counts)

    def next_time(self, now: float) -> float:
        times = self._arrivals.times
        return float(times[self._admitted]) if self._admitted < len(times) else np.inf


@njit(cache=True, nogil=True)
def _schedule(running, active, admitted, came, length, computed, counts, most, budget, mixed):
    """Rows of every running request, and newcomers. Returns (running, admitted so far, chunks)."""
    generating = 0
    for i in range(active):
        generating += length[running[i]] - computed[running[i]] == 1
    prompts = mixed if 2 * generating > active + came - admitted else budget
    chunks = 0
    for i in range(active):
        pending = length[running[i]] - computed[running[i]]
        counts[i] = min(pending, budget if pending == 1 else min(budget, prompts))
        budget -= counts[i]
        prompts -= 0 if pending == 1 else counts[i]
        chunks += counts[i] > 0
    while min(budget, prompts) > 0 and admitted < came and active < most:
        running[active] = admitted
        counts[active] = min(length[admitted] - computed[admitted], budget, prompts)
        budget -= counts[active]
        prompts -= counts[active]
        active, admitted, chunks = active + 1, admitted + 1, chunks + 1
    return active, admitted, chunks


@njit(cache=True, nogil=True)
def _advance(running, active, counts, length, computed, end):
    """Every complete request gets a token; those that have all of theirs leave. Returns how many still run."""
    left = 0
    for i in range(active):
        request = running[i]
        computed[request] += counts[i]
        if counts[i] > 0 and computed[request] == length[request]:
            length[request] += 1
        if computed[request] < end[request]:
            running[left] = request
            left += 1
    return left


class SecondBatches:
    """All requests of one second are one batch; the next one begins when its second and the batch before are over."""

    def __init__(self, arrivals: Arrivals) -> None:
        self._arrivals = arrivals
        self._batch = np.zeros(0, np.int64)
        self._position = 0
        """0: the prompts are next; n: the n-th generated token."""
        self._taken = 0

    def next_step(self, now: float) -> Step:
        if not len(self._batch):
            self._take(now)
        left = self._batch[self._arrivals.generated[self._batch] > self._position]
        self._batch = left
        if not len(left):
            return self.next_step(now) if self._taken < self._ready(now) else Step(left, left, left)
        context = self._arrivals.context[left]
        step = Step(left, np.zeros_like(left), context)
        if self._position:
            step = Step(left, context + self._position - 1, np.ones_like(left))
        self._position += 1
        return step

    def next_time(self, now: float) -> float:
        times = self._arrivals.times
        return float(np.floor(times[self._taken]) + 1) if self._taken < len(times) else np.inf

    def _ready(self, now: float) -> int:
        """Requests of all seconds that are over."""
        return int(np.searchsorted(self._arrivals.times, np.floor(now), side="left"))

    def _take(self, now: float) -> None:
        ready, times = self._ready(now), self._arrivals.times
        if self._taken < ready:
            second = np.floor(times[self._taken])
            end = int(np.searchsorted(times, second + 1, side="left"))
            self._batch, self._taken, self._position = np.arange(self._taken, end), end, 0
