"""A policy over all steps, and what comes of it."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from shared.elastic.cost import CostMeter
from shared.replay.inputs import Inputs
from shared.replay.policies import Policy, Settings, held_step, make_policy, static_homes
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
    policy = make_policy(name, work, inputs, settings)
    meter, size = CostMeter(inputs.misc_bytes), inputs.expert_bytes
    meter.provide(inputs.instances * inputs.instance_bytes + inputs.misc_bytes, 0.0)
    layers, now, resident, waited, late = work.layers(inputs), 0.0, 0.0, 0.0, 0
    times = np.zeros(len(work.earliest))
    for index, start in enumerate(work.earliest):
        if start > now:
            resident += _idle(policy, meter, now, float(start), size)
            now = float(start)
        spent = policy.step(index, now)
        meter.layers(spent.proxy * size, layers * inputs.misc_s)
        meter.hold(spent.resident / (spent.end - now) * size, now)
        resident += spent.resident
        times[index] = spent.moe_s / layers
        waited, late, now = waited + spent.waited_s, late + spent.late, spent.end
        if index % 256 == 0:
            progress(index / len(work.earliest))
    cost = meter.read(now)
    tiles = np.bincount(np.arange(layers) % work.loads.shape[1], minlength=work.loads.shape[1])
    calls = ((work.loads > 0).sum(axis=(0, 2)) * tiles).sum()
    return Outcome(
        name, times, waited, late / calls, resident / now, cost.proxy / 1e9, cost.resident / 1e9,
        cost.provisioned / 1e9, *policy.starts, now,
    )  # fmt: skip


def _idle(policy: Policy, meter: CostMeter, begin: float, end: float, size: float) -> float:
    resident = policy.idle(begin, end)
    meter.hold(resident / (end - begin) * size, begin)
    return resident


def closed(outcome: Outcome, static: Outcome, oracle: Outcome) -> float:
    """Share of the gap between static expert parallelism and perfect balance that a policy closes."""
    gap = static.times.mean() - oracle.times.mean()
    return float((static.times.mean() - outcome.times.mean()) / gap) if gap > 0 else 0.0
