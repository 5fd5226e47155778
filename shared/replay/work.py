"""The steps of a replay, formed once: every policy is given the same rows at the same times, so that times compare.

Batches follow a clock: the next step is formed when the one before has ended under static expert parallelism. Faster
policies compute the same steps sooner, as soon as their requests have come. A request is a passage of its domain's
trace, from a row that is drawn; its tokens are the rows that follow.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from shared.replay.arrivals import Arrivals
from shared.replay.batches import Batches, EngineBatches, SecondBatches
from shared.replay.inputs import Inputs
from shared.replay.routing import Mismatch, Passages, add_rows

Clock = Callable[[NDArray[np.int64]], float]
"""Loads [recorded layers, E] of a step -> its seconds."""


@dataclass(frozen=True)
class Work:
    """S steps of a model whose recorded layers are tiled."""

    earliest: NDArray[np.float64]
    """[S] seconds: when the last request of the step has come."""
    ends: NDArray[np.float64]
    """[S] by the clock."""
    rows: NDArray[np.int64]
    """[S]"""
    prefill: NDArray[np.bool_]
    """[S]: whether it computes prompts, more rows of some request than the one that its next token needs."""
    loads: NDArray[np.int64]
    """[S, recorded layers, E]: rows that chose each expert."""
    predicted: NDArray[np.int64]
    """[S, recorded layers, E]: as many, as foreseen ``distance`` layers before."""
    known: NDArray[np.bool_]
    """[recorded layers]: of which there is a prediction."""
    top_k: int

    @property
    def experts(self) -> int:
        return self.loads.shape[2]

    def layers(self, inputs: Inputs) -> int:
        return inputs.layers or self.loads.shape[1]


def form_work(
    domains: Sequence[tuple[Passages, Passages | None]],
    arrivals: Arrivals,
    inputs: Inputs,
    clock: Clock,
    a_second: bool = False,
    seed: int = 0,
    progress: Callable[[float], None] = lambda _: None,
) -> Work:
    """All steps until every request has its tokens.

    Args:
        domains: routing and predicted routing of each; requests are drawn from them evenly.
        a_second: all requests of one second are one batch, as in the paper; else batches are the engine's.
        progress: is told the share of requests that have arrived.

    Raises:
        Mismatch: the domains are traces of different models.
    """
    first = domains[0][0]
    for routing, _ in domains:
        if (routing.layers, routing.experts, routing.top_k) != (first.layers, first.experts, first.top_k):
            raise Mismatch("the routing traces are of different models: layers, experts or top-k differ")
    rng, count = np.random.default_rng(seed), len(arrivals.times)
    domain = rng.integers(0, len(domains), count)
    offset = rng.integers(0, [domains[d][0].rows for d in domain]) if count else domain
    batches: Batches = SecondBatches(arrivals) if a_second else EngineBatches(arrivals, inputs)
    spans, tables, now = [], [], 0.0
    while np.isfinite(now):
        step = batches.next_step(now)
        if not len(step.requests):
            now = max(now, batches.next_time(now))
            continue
        loads = np.zeros((2, len(first.layers), first.experts), np.int64)
        for number, (routing, predicted) in enumerate(domains):
            mine = domain[step.requests] == number
            starts = step.starts[mine] + offset[step.requests[mine]]
            add_rows(routing.sums, starts, step.counts[mine], loads[0])
            if predicted:
                add_rows(predicted.sums, starts, step.counts[mine], loads[1])
        end = now + clock(loads[0])
        spans.append((arrivals.times[step.requests].max(), end, step.counts.sum(), step.counts.max() > 1))
        tables.append(loads.astype(np.int32))
        if len(spans) % 256 == 0:
            progress(float(np.searchsorted(arrivals.times, now)) / count)
        now = end
    known = np.logical_and.reduce([p.known if p else np.zeros(len(first.layers), np.bool_) for _, p in domains])
    loads = np.stack(tables).astype(np.int64)
    earliest, ends, rows, prefill = (np.array(column) for column in zip(*spans, strict=True))
    return Work(earliest, ends, rows, prefill, loads[:, 0].copy(), loads[:, 1].copy(), known, first.top_k)
