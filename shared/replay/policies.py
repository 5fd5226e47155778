"""The policies of a replay: what each one does in a step, and while there is nothing to do."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

import numpy as np
from numba import njit
from numpy.typing import NDArray

from shared.elastic import placing, scaling
from shared.elastic.eplb import rebalance_experts
from shared.elastic.keep_alive import Histogram
from shared.errors import ConfigError
from shared.replay.elastic import ABSENT, Pool, elastic_step, fill, idle, move_homes
from shared.replay.inputs import BudgetTooSmall, Inputs
from shared.replay.papers import PaperPool, paper_step
from shared.replay.timing import Costs, Form, balanced_time, costs, even_time
from shared.replay.work import Work

FEWEST_STEPS = 16
"""Before `moemesh` looks at homes for the first time."""
EPLB_PERIOD_S = 600.0
"""The paper: "e.g. every ten minutes"."""


@dataclass(frozen=True)
class Parts:
    """The parts of ``moemesh``, for the ablation."""

    predictor: bool = True
    """Off: loads are expected to be those of the layer's step before."""
    scaler: bool = True
    """Off: one home each."""
    placer: bool = True
    """Off: homes are those of static expert parallelism, further ones on the instances after it."""
    keep_alive: bool = True
    """Off: every home is resident, always."""


@dataclass(frozen=True)
class Settings:
    """What policies can be told. Inputs are elsewhere: they are the same for all."""

    distance: int = 1
    """Layers between what is known and what is predicted (d)."""
    threshold: float = 0.2
    """Coefficient of variation that is even enough (V)."""
    keep_s: float = 60.0
    """Fixed keep-alive of ``paper``."""
    worth_s: float = 20.0
    """Idle time for which ``moemesh`` keeps an expert in any case."""
    budget: float = 1.1
    """Memory of ``moemesh`` for experts: so many times that of all experts once each, at most what instances have."""
    form: Form = Form.DEVICES
    parts: Parts = field(default_factory=Parts)
    period_s: float = 30.0
    """Between two looks of ``moemesh`` at homes."""
    samples: int = 128
    """Steps that it looks at, spread over the latest eight times as many."""
    extra: float = 0.1
    """Homes beyond the first that it may have, as a share of the experts of a layer."""


class Spent(NamedTuple):
    """What one step took."""

    moe_s: float
    """Of all layers, waits included."""
    waited_s: float
    proxy: float
    """Sum over layers of time x replicas of that layer, replica-seconds."""
    resident: float
    """Replica-seconds."""
    late: int
    """Experts for which an exchange waited."""
    end: float


class Policy(Protocol):
    """One run: steps in order, and the idle times between them."""

    def step(self, index: int, now: float) -> Spent:
        """Compute a step of the work, beginning now."""
        ...

    def idle(self, begin: float, end: float) -> float:
        """Nothing to do in between. Returns replica-seconds of residents."""
        ...

    @property
    def starts(self) -> tuple[int, int]:
        """Warm and cold ones so far."""
        ...


def make_policy(name: str, work: Work, inputs: Inputs, settings: Settings) -> Policy:
    """Raises ConfigError for an unknown policy, BudgetTooSmall."""
    check_policies([name])
    return POLICIES[name](work, inputs, settings)


def check_policies(names: Sequence[str]) -> None:
    """Raises ConfigError for one that is unknown."""
    for name in names:
        if name not in POLICIES:
            raise ConfigError("--policy", f"{name!r} is none of {', '.join(POLICIES)}")


def trimmed(homes: NDArray[np.bool_], usage: NDArray[np.float64], budget: NDArray[np.int64]) -> NDArray[np.bool_]:
    """Homes bool [layers, instances, E] without the further ones, least used first, that an instance has no memory for.

    usage [layers, E]; budget [instances]: replicas of all layers.
    """
    homes = homes.copy()
    for g, most in enumerate(budget):
        for layer, e in np.argwhere(homes[:, g])[np.argsort(usage[homes[:, g]], kind="stable")]:
            if homes[:, g].sum() <= most:
                break
            homes[layer, g, e] = homes[layer, :, e].sum() == 1
    return homes


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
        self._rules = (inputs.slots, most_extra, settings.threshold, settings.keep_s)
        self._times = (inputs.misc_s, inputs.warm_s, inputs.cold_s)

    def step(self, index: int, now: float) -> Spent:
        work = self.work
        result = paper_step(
            now, work.loads[index], work.predicted[index], work.loads[max(0, index - 1)], work.known,
            self.settings.distance, self.pool, self._rules, self.costs, self._times,
        )  # fmt: skip
        return Spent(*result)

    def idle(self, begin: float, end: float) -> float:
        return float(self.pool.held.sum() * (end - begin))

    @property
    def starts(self) -> tuple[int, int]:
        return int(self.pool.starts[0]), int(self.pool.starts[1])


class Moemesh:
    """Homes that follow the load slowly, residents that follow it at once, within a memory budget."""

    def __init__(self, work: Work, inputs: Inputs, settings: Settings) -> None:
        self.work, self.inputs, self.settings, self.parts = work, inputs, settings, settings.parts
        self.costs = costs(inputs, settings.form)
        self.layers, self.experts, self.recorded = work.layers(inputs), work.experts, work.loads.shape[1]
        self._times = (inputs.misc_s, inputs.warm_s, inputs.cold_s, inputs.start_share)
        self._known = work.known if self.parts.predictor else np.zeros_like(work.known)
        self.pool = self._first_pool(self._budget())
        self._keep = Histogram(
            self.recorded,
            self.experts,
            fallback=settings.keep_s,
            start_s=inputs.warm_s,
            worth_s=settings.worth_s,
            tail=0.999,
        )
        self._counts = np.ones((self.recorded, self.experts), np.int64)
        self._homes = self.pool.homes[: self.recorded].copy()
        self._next = 0.0

    def _budget(self) -> int:
        """Residents per instance."""
        inputs = self.inputs
        if not self.parts.keep_alive:
            return inputs.slots
        given = self.settings.budget * self.layers * self.experts * inputs.expert_bytes
        smallest = inputs.instances * self.work.top_k
        residents = int(given // inputs.expert_bytes) // inputs.instances
        if residents < self.work.top_k:
            raise BudgetTooSmall(given, smallest * inputs.expert_bytes, f"the top-{self.work.top_k} of one layer")
        return min(residents, inputs.slots)

    def _first_pool(self, budget: int) -> Pool:
        """Static homes; what exceeds the budget is not resident, the last experts of every layer first."""
        inputs = self.inputs
        homes = np.repeat(static_homes(inputs.instances, self.experts)[None], self.layers, axis=0)
        rank = np.cumsum(homes, axis=2) * self.layers + np.arange(self.layers)[:, None, None]
        ready = np.full(homes.shape, ABSENT)
        for g in range(inputs.instances):
            mine = np.argwhere(homes[:, g])
            order = np.argsort(rank[mine[:, 0], g, mine[:, 1]], kind="stable")[:budget]
            ready[mine[order, 0], g, mine[order, 1]] = 0.0
        present = np.isfinite(ready)
        return Pool(
            homes, ready, present.sum(axis=1), np.zeros(inputs.instances), present.sum(axis=(0, 2)),
            np.full(inputs.instances, budget), np.ones((self.recorded, self.experts)), np.zeros(2, np.int64),
            present.sum(axis=1) > 0,
        )  # fmt: skip

    def step(self, index: int, now: float) -> Spent:
        work, before = self.work, max(0, index - 1)
        if now >= self._next and index >= FEWEST_STEPS:
            self._next = now + self.settings.period_s
            self._replan(index, now)
        if self.parts.keep_alive:
            fill(now, 0.02, self.pool, self._times)
        result = elastic_step(
            now, work.loads[index], work.predicted[index], work.loads[before], self._known, self.settings.distance,
            self.pool, self.costs, self._times, self.parts.scaler,
        )  # fmt: skip
        for layer in range(self.recorded):
            self._keep.observe(layer, np.flatnonzero(work.loads[index, layer]), now)
        return Spent(*result)

    def idle(self, begin: float, end: float) -> float:
        if not self.parts.keep_alive:
            return float(self.pool.held.sum() * (end - begin))
        windows = [self._keep.windows(layer) for layer in range(self.recorded)]
        stop, warm, last = (np.stack([w[field] for w in windows]) for field in range(3))
        return float(idle(begin, end, stop, warm, last, self.pool, self._times))

    @property
    def starts(self) -> tuple[int, int]:
        return int(self.pool.starts[0]), int(self.pool.starts[1])

    def _replan(self, index: int, now: float) -> None:
        """Homes for the steps that there were; tiles of a recorded layer have them one instance further each."""
        seen = np.arange(index - 1, max(-1, index - 1 - 8 * self.settings.samples), -8)
        for layer in range(self.recorded):
            foreseen = self._known[layer]
            loads = (self.work.predicted if foreseen else self.work.loads)[seen, layer].astype(np.float64)
            self._counts[layer] = self._scale(loads, self._counts[layer])
            self._homes[layer] = self._place(loads, self._counts[layer], self._homes[layer])
        tiles = [np.roll(self._homes[n % self.recorded], n // self.recorded, axis=0) for n in range(self.layers)]
        usage = np.stack([self.pool.usage[n % self.recorded] for n in range(self.layers)])
        move_homes(now, trimmed(np.stack(tiles), usage, self.pool.budget), self.pool, self._times)

    @property
    def _homes_per_layer(self) -> int:
        """Most of them: no more than fit into memory beside each other."""
        fit = int(self.pool.budget.sum()) // self.layers
        return max(self.experts, min(fit, self.experts + round(self.settings.extra * self.experts)))

    def _scale(self, loads: NDArray[np.float64], previous: NDArray[np.int64]) -> NDArray[np.int64]:
        if not self.parts.scaler:
            return np.ones_like(previous)
        rules = scaling.Rules(self._homes_per_layer, self.inputs.instances, self.settings.threshold)
        return scaling.moemesh(loads.mean(axis=0), previous, rules)

    def _place(
        self, loads: NDArray[np.float64], counts: NDArray[np.int64], homes: NDArray[np.bool_]
    ) -> NDArray[np.bool_]:
        count = self.inputs.instances
        if not self.parts.placer:
            first = static_homes(count, self.experts).argmax(axis=0)
            offset = (np.arange(count)[:, None] - first) % count
            return offset < counts
        slots = np.full(count, -(-self._homes_per_layer // count) + 1)
        rows = self.costs[1] / self.costs[0]
        return placing.moemesh(loads, counts, slots, homes, rows)


POLICIES: Mapping[str, Callable[[Work, Inputs, Settings], Policy]] = {
    "static": Static, "eplb": Eplb, "oracle": Oracle, "paper": Paper, "moemesh": Moemesh,
}  # fmt: skip
