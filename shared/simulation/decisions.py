"""What every system decides from window to window: a forecast, a plan for it, and what both cost. Pure."""

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from shared.perf_model import Load
from shared.planning.deciding import LEAST_RATE, nearest
from shared.planning.memory import attention_bytes
from shared.planning.outlook import MOST_BATCH
from shared.planning.plan import Plan
from shared.planning.rivals import Systems
from shared.planning.setting import Demand, Mesh, Monolith, Setting, Slo, mesh_step, monolith_step

Floats = NDArray[np.float64]
BATCHES = np.concatenate([[1.0, 2.0, 4.0, 8.0], np.geomspace(16, MOST_BATCH, 49)])
CHUNKS = np.array([0.0, 16.0, 64.0, 256.0, 1024.0, 4096.0, 16384.0, 65536.0])
STEP = 0.04
"""Rates within so much of each other are planned for as one."""


@dataclass(frozen=True)
class Schedule:
    """Plans of one system over time."""

    plans: tuple[Plan, ...]
    """Those that are used at all."""
    used: NDArray[np.int64]
    """[windows], which one is decided on at the beginning of each window."""
    starts: Floats
    """[windows], when it is put to use."""
    paid: Floats
    """[windows], device-seconds."""

    @property
    def changes(self) -> int:
        return int((np.diff(self.used) != 0).sum())


def forecast(rates: Floats, headroom: float) -> Floats:
    """Requests per second to plan each window [windows] for, from what came before it: the last window, or a line
    through the last two where that is higher. The first window is known, as if it had been like that before."""
    before = np.concatenate([rates[:1], rates[:-1]])
    earlier = np.concatenate([rates[:1], before[:-1]])
    return headroom * np.maximum(before, 2 * before - earlier)


def decide(choose: Callable[[float], Plan | None], rates: Floats, window_s: float, start_s: float) -> Schedule:
    """A plan for every window.

    Args:
        choose: the plan for a rate, None where nothing keeps the limits; then for the highest rate that something does.
        rates: [windows], that are planned for.
        start_s: until new devices serve; and as long while devices drain. Both plans are paid for meanwhile.
    """
    known: dict[float, Plan] = {}
    decided = [_plan_for(choose, _rounded(rate), known) for rate in rates]
    names = list(dict.fromkeys(plan.name for plan in decided))
    plans = tuple(next(plan for plan in decided if plan.name == name) for name in names)
    used = np.array([names.index(plan.name) for plan in decided], np.int64)
    devices = np.array([plans[i].devices for i in used], np.float64)
    previous = np.concatenate([devices[:1], devices[:-1]])
    changed = np.concatenate([[False], np.diff(used) != 0])
    begin = np.arange(len(rates)) * window_s
    grows = changed & (devices >= previous)
    both = np.where(changed, np.maximum(devices, previous), devices)
    starts = np.where(grows, begin + start_s, begin).astype(np.float64)
    return Schedule(plans, used, starts, start_s * both + (window_s - start_s) * devices)


def _plan_for(choose: Callable[[float], Plan | None], asked: float, known: dict[float, Plan]) -> Plan:
    if asked not in known:
        known[asked] = nearest(choose, asked)
    return known[asked]


def _rounded(rate: float) -> float:
    """Up to the next step of a grid."""
    return float((1 + STEP) ** np.ceil(np.log(max(rate, LEAST_RATE)) / np.log(1 + STEP)))


def chooser(systems: Systems, name: str, demand: Demand, slo: Slo) -> Callable[[float], Plan | None]:
    """A system's rule as a function of the rate."""
    return lambda rate: systems.choose(name, replace(demand, rate=rate), slo)


def times_of(setting: Setting, plan: Plan, demand: Demand) -> Floats:
    """Seconds of a step [BATCHES, CHUNKS] of a plan: sequences in decode, rows of prompts."""
    batch, chunk = (grid.ravel() for grid in np.meshgrid(BATCHES, CHUNKS, indexing="ij"))
    attended = setting.sizes.attended
    load = Load(batch, chunk, attended(demand.context), attended(demand.prompt / 2))
    first, second = np.full(len(batch), float(plan.attention)), np.full(len(batch), float(plan.experts))
    if plan.kind == "mesh":
        outcome = mesh_step(setting, load, Mesh(first, second, plan.micro_batches))
    else:
        outcome = monolith_step(setting, load, Monolith(first, second))
    return outcome.step.seconds.reshape(len(BATCHES), len(CHUNKS))


def room_of(setting: Setting, plan: Plan, demand: Demand) -> Floats:
    """[2]: most sequences that the caches hold, and most rows of prompts in a step."""
    sizes, instances = setting.sizes, plan.attention if plan.kind == "mesh" else plan.devices
    sequences = np.array([0.0, 1.0])
    none, one = attention_bytes(sizes, sequences, demand.context, sequences + demand.chunk)
    spare = float(setting.room.attention_bytes - none)
    if plan.kind == "monolith":
        spare -= len(sizes.moe_layers) * sizes.expert_bytes * -(-sizes.experts // plan.experts)
    return np.array([max(1.0, spare // float(one - none)) * instances, demand.chunk * instances])
