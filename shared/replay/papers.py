"""The paper's policy, compiled: Algorithms 1 and 2 for every layer of every step, and a fixed keep-alive.

Source: MoEless (arXiv 2603.06350), sections 4.2 to 4.4. What it leaves open is decided here: a replica that is still
being started is not used if its expert has another; where memory is full, the replica that has been idle longest makes
room, and without one the start is not made. The first replica of an expert is never stopped.
"""
# ruff: noqa: ANN001, ANN201, ANN202 - numba infers the types

from typing import NamedTuple

import numpy as np
from numba import njit
from numpy.typing import NDArray

from shared.elastic.kernels import fill_paper_counts, fill_paper_homes
from shared.replay.base import Settings, Spent
from shared.replay.baselines import Static
from shared.replay.inputs import Inputs
from shared.replay.timing import Costs, costs, even_time
from shared.replay.work import Work

NOBODY = -1


class PaperPool(NamedTuple):
    """What all instances hold, [layers, instances, E] each unless it says otherwise. Changed in place."""

    plan: NDArray[np.int64]
    """Replicas that the last placement wants."""
    alive: NDArray[np.int64]
    """Replicas that hold memory."""
    ready: NDArray[np.float64]
    """From when on all of them can compute."""
    used: NDArray[np.float64]
    """When the placement wanted one last."""
    free: NDArray[np.float64]
    """[instances]: when the start that is last in line will have ended."""
    held: NDArray[np.int64]
    """[instances]"""
    starts: NDArray[np.int64]
    """[warm, cold]"""


@njit(cache=True, nogil=True)
def paper_step(now, loads, expected, history, known, distance, pool, rules, costs, times):
    """All layers of one step; see ``elastic.elastic_step``. rules: (slots, most_extra, threshold, keep_s)."""
    layers, recorded = len(pool.plan), len(loads)
    spent = waited = proxy = resident = 0.0
    late = 0
    for layer in range(layers):
        r, m = layer % recorded, (layer + distance) % layers
        foreseen = layer + distance < layers and known[m % recorded]
        forecast = expected[m % recorded] if foreseen else history[m % recorded]
        resident -= _release(now, m, rules[3], pool)
        _plan(now, m, forecast.astype(np.float64), pool, rules, times)
        waits = np.zeros(len(pool.held))
        usable = np.zeros((len(pool.held), loads.shape[1]), np.int64)
        for e in range(loads.shape[1]):
            if loads[r, e] > 0:
                late += _usable(now, layer, e, pool, waits, usable)
        time = even_time(loads[r], usable, waits, costs)
        if waits.max() > 0:
            waited += max(0.0, time - even_time(loads[r], usable, np.zeros(len(waits)), costs))
        spent += time
        proxy += time * pool.alive[layer].sum()
        resident += pool.held.sum() * (time + times[0])
        now += time + times[0]
    return spent, waited, proxy, resident, late, now


@njit(cache=True, nogil=True)
def _release(now, m, keep_s, pool):
    """Stop replicas that were not wanted for so long. Returns the replica-seconds since they should have gone."""
    late = 0.0
    for g in range(len(pool.held)):
        for e in range(pool.plan.shape[2]):
            surplus = pool.alive[m, g, e] - pool.plan[m, g, e]
            if surplus > 0 and now - pool.used[m, g, e] > keep_s:
                late += surplus * (now - pool.used[m, g, e] - keep_s)
                pool.alive[m, g, e] -= surplus
                pool.held[g] -= surplus
    return late


@njit(cache=True, nogil=True)
def _plan(now, m, forecast, pool, rules, times):
    slots, most_extra, threshold, _ = rules
    counts = np.ones(len(forecast), np.int64)
    fill_paper_counts(forecast, most_extra, threshold, counts)
    fill_paper_homes(forecast, counts, pool.plan[m].copy(), pool.plan[m])
    for g in range(len(pool.held)):
        for e in range(len(forecast)):
            while pool.plan[m, g, e] > pool.alive[m, g, e]:
                if pool.held[g] >= slots and not _evict(now, g, pool):
                    pool.plan[m, g, e] = pool.alive[m, g, e]
                    break
                pool.free[g] = max(pool.free[g], now) + times[1]
                pool.ready[m, g, e] = pool.free[g]
                pool.alive[m, g, e] += 1
                pool.held[g] += 1
                pool.starts[0] += 1
            if pool.plan[m, g, e] > 0:
                pool.used[m, g, e] = now


@njit(cache=True, nogil=True)
def _evict(now, g, pool):
    """Stop the replica that has been idle longest on an instance. False: none is idle."""
    layer, expert, oldest = NOBODY, NOBODY, now
    for m in range(len(pool.plan)):
        for e in range(pool.plan.shape[2]):
            idle = pool.alive[m, g, e] > pool.plan[m, g, e] and pool.alive[m, :, e].sum() > 1
            if idle and pool.used[m, g, e] < oldest:
                layer, expert, oldest = m, e, pool.used[m, g, e]
    if layer == NOBODY:
        return False
    pool.alive[layer, g, expert] -= 1
    pool.held[g] -= 1
    return True


@njit(cache=True, nogil=True)
def _usable(now, layer, e, pool, waits, usable):
    """Planned replicas that are ready; else any that is; else the first one that will be, for which its GPU waits."""
    first = NOBODY
    found = 0
    for g in range(len(pool.held)):
        if pool.plan[layer, g, e] > 0 and pool.ready[layer, g, e] <= now:
            usable[g, e] = pool.plan[layer, g, e]
            found += 1
    for g in range(len(pool.held)):
        if (
            found == 0
            and pool.alive[layer, g, e] > 0
            and (first == NOBODY or pool.ready[layer, g, e] < pool.ready[layer, first, e])
        ):
            first = g
    if found > 0:
        return 0
    usable[first, e] = 1
    waits[first] = max(waits[first], pool.ready[layer, first, e] - now)
    return 1 if pool.ready[layer, first, e] > now else 0


class Paper:
    """Algorithms 1 and 2 with predicted loads, and a fixed keep-alive."""

    def __init__(self, work: Work, inputs: Inputs, settings: Settings) -> None:
        self.work, self.inputs, self.settings = work, inputs, settings
        self.costs: Costs = costs(inputs, settings.form)
        homes = Static(work, inputs, settings).held
        layers = work.layers(inputs)
        alive = homes[np.arange(layers) % len(homes)]
        self.pool = PaperPool(
            alive.copy(), alive.copy(), np.zeros(alive.shape), np.zeros(alive.shape), np.zeros(inputs.instances),
            alive.sum(axis=(0, 2)), np.zeros(2, np.int64),
        )  # fmt: skip
        most_extra = int(np.ceil(inputs.cap_bytes / inputs.expert_bytes))
        self._rules = [
            (inputs.slots, most_extra, settings.threshold_of(prefill), settings.keep_s) for prefill in (False, True)
        ]
        self._times = (inputs.misc_s, inputs.warm_s, inputs.cold_s)

    def step(self, index: int, now: float) -> Spent:
        work = self.work
        result = paper_step(
            now, work.loads[index], work.predicted[index], work.loads[max(0, index - 1)], work.known,
            self.settings.distance, self.pool, self._rules[int(work.prefill[index])], self.costs, self._times,
        )  # fmt: skip
        return Spent(*result)

    def idle(self, begin: float, end: float) -> float:
        return float(self.pool.held.sum() * (end - begin))

    @property
    def starts(self) -> tuple[int, int]:
        return int(self.pool.starts[0]), int(self.pool.starts[1])
