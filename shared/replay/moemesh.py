"""The policy ``moemesh``: homes follow the load slowly, residents follow it at once, within a memory budget."""

import numpy as np
from numpy.typing import NDArray

from shared.elastic import placing, scaling
from shared.elastic.keep_alive import Histogram
from shared.replay.base import Settings, Spent
from shared.replay.baselines import static_homes
from shared.replay.elastic import elastic_step
from shared.replay.inputs import BudgetTooSmall, Inputs
from shared.replay.pool import ABSENT, Pool
from shared.replay.timing import costs
from shared.replay.upkeep import fill, idle, move_homes
from shared.replay.work import Work

FEWEST_STEPS = 16
"""Before it looks at homes for the first time."""
EARLY = 0.5
"""Starts that take less of an instance's time than this share begin while it computes, others after it."""

Homes = NDArray[np.bool_]
"""[layers, instances, E], or of one layer"""
Counts = NDArray[np.int64]


class Moemesh:
    """See the module."""

    def __init__(self, work: Work, inputs: Inputs, settings: Settings) -> None:
        self.work, self.settings, self.parts = work, settings, settings.parts
        self.layers, self._times = (
            work.layers(inputs),
            (inputs.misc_s, inputs.warm_s, inputs.cold_s, inputs.start_share),
        )
        self._costs = costs(inputs, settings.form)
        self._rare = settings.wait_s / inputs.warm_s
        rare = self._rare if self.parts.keep_alive else -1.0
        rules = settings.distance, self.parts.scaler, inputs.start_share < EARLY, rare
        self._rules = [(*rules, settings.threshold_of(prefill)) for prefill in (False, True)]
        self._known = work.known if self.parts.predictor else np.zeros_like(work.known)
        self.pool = first_pool(work, inputs, residents_of(work, inputs, settings))
        self._planner = Planner(work, inputs, settings, self._known)
        layers, keep_s = work.loads.shape[1], settings.keep_s
        self._keep = Histogram(
            layers, work.experts, keep_s, start_s=inputs.warm_s, worth_s=settings.worth_s, tail=0.999
        )
        self._next = 0.0

    def step(self, index: int, now: float) -> Spent:
        work, before, rules = self.work, max(0, index - 1), self._rules[int(self.work.prefill[index])]
        if now >= self._next and index >= FEWEST_STEPS:
            self._next = now + self.settings.period_s
            homes = self._planner.homes(index, self.layers, self.pool)
            move_homes(now, homes, self.pool, self._times)
        if self.parts.keep_alive:
            fill(now, self._rare, self.pool, self._times)
        result = elastic_step(
            now, work.loads[index], work.predicted[index], work.loads[before], self._known, rules,
            self.pool, self._costs, self._times,
        )  # fmt: skip
        for layer, loads in enumerate(work.loads[index]):
            self._keep.observe(layer, np.flatnonzero(loads), now)
        return Spent(*result)

    def idle(self, begin: float, end: float) -> float:
        if not self.parts.keep_alive:
            return float(self.pool.held.sum() * (end - begin))
        windows = [self._keep.windows(layer) for layer in range(self.work.loads.shape[1])]
        stops, warm, last = (np.stack([w[field] for w in windows]) for field in range(3))
        return float(idle(begin, end, stops, warm, last, self.pool, self._times))

    @property
    def starts(self) -> tuple[int, int]:
        return int(self.pool.starts[0]), int(self.pool.starts[1])


def residents_of(work: Work, inputs: Inputs, settings: Settings) -> int:
    """Most of them on each instance. Raises BudgetTooSmall."""
    if not settings.parts.keep_alive:
        return inputs.slots
    given = settings.budget * work.layers(inputs) * work.experts * inputs.expert_bytes
    residents = int(given // inputs.expert_bytes) // inputs.instances
    if residents < work.top_k:
        smallest = inputs.instances * work.top_k * inputs.expert_bytes
        raise BudgetTooSmall(given, smallest, f"the top-{work.top_k} of one layer")
    return min(residents, inputs.slots)


def first_pool(work: Work, inputs: Inputs, budget: int) -> Pool:
    """Static homes; what exceeds the budget is not resident, the last experts of every layer first."""
    layers, count = work.layers(inputs), inputs.instances
    homes = np.repeat(static_homes(count, work.experts)[None], layers, axis=0)
    rank = np.cumsum(homes, axis=2) * layers + np.arange(layers)[:, None, None]
    ready = np.full(homes.shape, ABSENT)
    for g in range(count):
        mine = np.argwhere(homes[:, g])
        order = np.argsort(rank[mine[:, 0], g, mine[:, 1]], kind="stable")[:budget]
        ready[mine[order, 0], g, mine[order, 1]] = 0.0
    copies, held = np.isfinite(ready).sum(axis=1), np.isfinite(ready).sum(axis=(0, 2))
    return Pool(
        homes, ready, copies, np.zeros(count), held, np.full(count, budget),
        np.ones((work.loads.shape[1], work.experts)), np.zeros(2, np.int64), copies > 0,
    )  # fmt: skip


class Planner:
    """Homes for the steps that there were."""

    def __init__(self, work: Work, inputs: Inputs, settings: Settings, known: NDArray[np.bool_]) -> None:
        self._work, self._inputs, self._settings, self._known = work, inputs, settings, known
        row_s, replica_s, *_ = costs(inputs, settings.form)
        self._replica_rows = replica_s / row_s
        self._homes = np.repeat(static_homes(inputs.instances, work.experts)[None], work.loads.shape[1], axis=0)
        self._counts = np.ones((work.loads.shape[1], work.experts), np.int64)

    def homes(self, index: int, layers: int, pool: Pool) -> Homes:
        """For all layers; tiles of a recorded layer have them one instance further each."""
        seen = np.arange(index - 1, max(-1, index - 1 - 8 * self._settings.samples), -8)
        most = self._most(int(pool.budget.sum()) // layers)
        threshold = min(self._settings.threshold_of(prefill) for prefill in np.unique(self._work.prefill[seen]))
        for layer in range(len(self._homes)):
            loads = self._work.loads[seen, layer].astype(np.float64)
            self._counts[layer] = self._scale(loads.mean(axis=0), self._counts[layer], most, threshold)
            self._homes[layer] = self._place(loads, self._counts[layer], self._homes[layer], most)
        recorded = np.arange(layers) % len(self._homes)
        tiles = [np.roll(self._homes[r], n // len(self._homes), axis=0) for n, r in enumerate(recorded)]
        return trimmed(np.stack(tiles), pool.share[recorded], pool.budget)

    def _most(self, fit: int) -> int:
        """Homes of a layer: no more than fit into memory beside each other."""
        experts = self._work.experts
        return max(experts, min(fit, experts + round(self._settings.extra * experts)))

    def _scale(self, loads: NDArray[np.float64], previous: Counts, most: int, threshold: float) -> Counts:
        if not self._settings.parts.scaler:
            return np.ones_like(previous)
        return scaling.moemesh(loads, previous, scaling.Rules(most, self._inputs.instances, threshold))

    def _place(self, loads: NDArray[np.float64], counts: Counts, homes: Homes, most: int) -> Homes:
        count = self._inputs.instances
        if not self._settings.parts.placer:
            first = static_homes(count, len(counts)).argmax(axis=0)
            return (np.arange(count)[:, None] - first) % count < counts
        return placing.moemesh(loads, counts, np.full(count, -(-most // count) + 1), homes, self._replica_rows)


def trimmed(homes: Homes, share: NDArray[np.float64], budget: Counts) -> Homes:
    """Homes of all layers without the further ones, least called first, that an instance has no memory for.

    share [layers, E]: of the steps that call an expert; budget [instances]: replicas of all layers.
    """
    homes = homes.copy()
    for g, most in enumerate(budget):
        for layer, e in np.argwhere(homes[:, g])[np.argsort(share[homes[:, g]], kind="stable")]:
            if homes[:, g].sum() <= most:
                break
            homes[layer, g, e] = homes[layer, :, e].sum() == 1
    return homes
