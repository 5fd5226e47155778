"""A policy over all steps, and what comes of it."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from shared.elastic.cost import CostMeter
from shared.replay.base import Settings, Spent
from shared.replay.baselines import held_step, static_homes
from shared.replay.inputs import Inputs
from shared.replay.policies import make_policy
from shared.replay.timing import Form, costs
from shared.replay.work import Clock, Work


@dataclass(frozen=True)
class Outcome:
    """One policy."""

    policy: str
    times: NDArray[np.float64]
    """[S]: mean MoE-layer time of each step, seconds, waits included, without T_misc."""
    waited_s: float
    """In all."""
    late: float
    """Share of expert calls, distinct experts per exchange, that waited for a start."""
    residents: float
    """Mean over time, in experts."""
    proxy: float
    resident: float
    provisioned: float
    """The three forms of cost, GB-seconds."""
    warm: int
    cold: int
    ended: float
    """Seconds."""
    trail: NDArray[np.float64]
    """[intervals, 2]: when each step or pause begins, and its mean number of residents."""

    def as_dict(self) -> dict[str, float | str]:
        """Rounded, for JSON."""
        percentiles = np.percentile(self.times, (50, 99)) * 1e3
        return {
            "policy": self.policy,
            "layer_ms": round(float(self.times.mean()) * 1e3, 4),
            "layer_ms_p50": round(float(percentiles[0]), 4),
            "layer_ms_p99": round(float(percentiles[1]), 4),
            "waited_s": round(self.waited_s, 3),
            "late_share": round(float(self.late), 5),
            "residents": round(self.residents, 1),
            "proxy_gb_s": round(self.proxy, 2),
            "resident_gb_s": round(self.resident, 1),
            "provisioned_gb_s": round(self.provisioned, 1),
            "warm_starts": self.warm,
            "cold_starts": self.cold,
            "seconds": round(self.ended, 1),
        }


def static_clock(inputs: Inputs, layers: int, experts: int, form: Form) -> Clock:
    """How long a step takes under static expert parallelism: what batches are formed by."""
    homes = static_homes(inputs.instances, experts).astype(np.int64)
    held, count, numbers = np.repeat(homes[None], layers, axis=0), inputs.layers or layers, costs(inputs, form)
    return lambda loads: float(held_step(loads, held, count, numbers)[0]) + count * inputs.misc_s


def run_policy(
    name: str, work: Work, inputs: Inputs, settings: Settings, progress: Callable[[float], None] = lambda _: None
) -> Outcome:
    """Every step begins when its requests have come and the one before has ended. Raises as ``make_policy`` does."""
    policy, layers, now = make_policy(name, work, inputs, settings), work.layers(inputs), 0.0
    books, times = _Books(inputs), np.zeros(len(work.earliest))
    for index, start in enumerate(work.earliest.tolist()):
        if start > now:
            books.hold(policy.idle(now, start), now, start)
            now = start
        spent = policy.step(index, now)
        books.hold(spent.resident, now, spent.end)
        books.step(spent, layers)
        times[index], now = spent.moe_s / layers, spent.end
        if index % 256 == 0:
            progress(index / len(times))
    return books.close(name, times, late_of=_calls(work, layers), starts=policy.starts, now=now)


class _Books:
    """What adds up over a run."""

    def __init__(self, inputs: Inputs) -> None:
        self._inputs, self._meter = inputs, CostMeter(inputs.misc_bytes)
        self._meter.provide(inputs.instances * inputs.instance_bytes + inputs.misc_bytes, 0.0)
        self._trail: list[tuple[float, float]] = []
        self._resident = self._waited = 0.0
        self._late = 0

    def hold(self, resident: float, begin: float, end: float) -> None:
        """So many replica-seconds from ``begin`` to ``end``."""
        self._resident += resident
        self._trail.append((begin, resident / (end - begin)))
        self._meter.hold(resident / (end - begin) * self._inputs.expert_bytes, begin)

    def step(self, spent: Spent, layers: int) -> None:
        self._meter.layers(spent.proxy * self._inputs.expert_bytes, layers * self._inputs.misc_s)
        self._waited += spent.waited_s
        self._late += spent.late

    def close(
        self, policy: str, times: NDArray[np.float64], late_of: float, starts: tuple[int, int], now: float
    ) -> Outcome:
        cost = self._meter.read(now)
        return Outcome(
            policy, times, self._waited, self._late / late_of, self._resident / now, cost.proxy / 1e9,
            cost.resident / 1e9, cost.provisioned / 1e9, *starts, now, np.array(self._trail),
        )  # fmt: skip


def _calls(work: Work, layers: int) -> float:
    """Distinct experts of all exchanges."""
    recorded = work.loads.shape[1]
    tiles = np.bincount(np.arange(layers) % recorded, minlength=recorded)
    return float(((work.loads > 0).sum(axis=(0, 2)) * tiles).sum())


def closed(outcome: Outcome, static: Outcome, oracle: Outcome) -> float:
    """Share of the gap between static expert parallelism and perfect balance that a policy closes."""
    gap = static.times.mean() - oracle.times.mean()
    return float((static.times.mean() - outcome.times.mean()) / gap) if gap > 0 else 0.0
