"""The policies that others are compared with: static expert parallelism, EPLB, perfect balance."""

import numpy as np
from numba import njit
from numpy.typing import NDArray

from shared.elastic.eplb import rebalance_experts
from shared.replay.base import Settings, Spent
from shared.replay.inputs import BudgetTooSmall, Inputs
from shared.replay.timing import balanced_time, costs, even_time
from shared.replay.work import Work

EPLB_PERIOD_S = 600.0
"""The paper: "e.g. every ten minutes"."""


def static_homes(instances: int, experts: int) -> NDArray[np.bool_]:
    """Expert parallelism: blocks of neighbours, bool [instances, E]."""
    return np.arange(instances)[:, None] == np.arange(experts) * instances // experts


class Static:
    """One home each, always resident. EPLB changes its table now and then."""

    def __init__(self, work: Work, inputs: Inputs, settings: Settings) -> None:
        self.work, self.inputs = work, inputs
        self.layers = work.layers(inputs)
        self.costs = costs(inputs, settings.form)
        homes = static_homes(inputs.instances, work.experts)
        self.held = np.repeat(homes[None].astype(np.int64), work.loads.shape[1], axis=0)
        """[recorded layers, instances, E]"""
        if self.held[0].sum(axis=1).max() * self.layers > inputs.slots:
            raise BudgetTooSmall(
                inputs.instances * inputs.instance_bytes,
                inputs.instances * inputs.expert_bytes * self.held[0].sum(axis=1).max() * self.layers,
                "every expert at home once",
            )
        self.moved = 0

    def step(self, index: int, now: float) -> Spent:
        spent, proxy = held_step(self.work.loads[index], self.held, self.layers, self.costs)
        end = now + spent + self.layers * self.inputs.misc_s
        return Spent(spent, 0.0, proxy, self.idle(now, end), 0, end)

    def idle(self, begin: float, end: float) -> float:
        return self._residents * (end - begin)

    @property
    def _residents(self) -> float:
        tiles = np.bincount(np.arange(self.layers) % len(self.held), minlength=len(self.held))
        return float((self.held.sum(axis=(1, 2)) * tiles).sum())

    @property
    def starts(self) -> tuple[int, int]:
        return self.moved, 0


class Eplb(Static):
    """DeepSeek's EPLB from the loads so far, every ten minutes. It waits for no start: they come before the switch."""

    def __init__(self, work: Work, inputs: Inputs, settings: Settings) -> None:
        super().__init__(work, inputs, settings)
        self._next = EPLB_PERIOD_S
        self._seen = np.zeros(work.loads.shape[1:], np.int64)

    def step(self, index: int, now: float) -> Spent:
        if now >= self._next:
            self._next = (now // EPLB_PERIOD_S + 1) * EPLB_PERIOD_S
            self._rebalance()
        self._seen += self.work.loads[index]
        return super().step(index, now)

    def _rebalance(self) -> None:
        count, experts = self.inputs.instances, self.work.experts
        replicas = -(-experts // count) * count + count * self.inputs.eplb_extra
        table = rebalance_experts(self._seen.astype(np.float64), replicas, 1, 1, count).reshape(
            len(self.held), count, -1
        )
        held = np.zeros_like(self.held)
        for layer, g in np.ndindex(table.shape[:2]):
            held[layer, g] = np.bincount(table[layer, g], minlength=experts)
        self.moved += int(np.maximum(held - self.held, 0).sum()) * self.layers // len(self.held)
        self.held = held
        self._seen[:] = 0


class Oracle(Static):
    """Perfect balance, as a capacity-aware router would have it: not lossless, and faster than any lossless policy."""

    def step(self, index: int, now: float) -> Spent:
        spent = _balanced_step(self.work.loads[index], self.layers, self.inputs.instances, self.costs)
        end = now + spent + self.layers * self.inputs.misc_s
        return Spent(spent, 0.0, spent * self.work.experts, self.idle(now, end), 0, end)


@njit(cache=True, nogil=True)
def held_step(loads, held, layers, costs):  # noqa: ANN001, ANN201
    """(MoE seconds, proxy) of all layers."""
    spent = proxy = 0.0
    for r in range(len(loads)):
        tiles = (layers - r + len(loads) - 1) // len(loads)
        time = even_time(loads[r], held[r], np.zeros(len(held[r])), costs) * tiles
        spent += time
        proxy += time * held[r].sum()
    return spent, proxy


@njit(cache=True, nogil=True)
def _balanced_step(loads, layers, instances, costs):  # noqa: ANN001, ANN202
    spent = 0.0
    for r in range(len(loads)):
        spent += balanced_time(loads[r], instances, costs) * ((layers - r + len(loads) - 1) // len(loads))
    return spent
