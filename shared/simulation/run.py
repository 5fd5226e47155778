"""A scenario with one system after the other, and what comes of it. Everything here is simulated."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from shared.planning.assemble import assemble
from shared.planning.deciding import LEAST_RATE, Unservable
from shared.planning.hardware import Hardware
from shared.planning.rivals import TIERS, Systems, systems_of
from shared.planning.routing import synthetic
from shared.planning.setting import Demand, Slo
from shared.planning.sizes import read_sizes
from shared.simulation.decisions import (
    BATCHES,
    CHUNKS,
    Schedule,
    chooser,
    decide,
    forecast,
    room_of,
    times_of,
)
from shared.simulation.kernel import serve
from shared.simulation.scenario import Scenario
from shared.simulation.traffic import Requests, day, recorded

Floats = NDArray[np.float64]
Show = Callable[[str, float], None]
MOST_CONTEXT = 1 << 17


@dataclass(frozen=True)
class Simulated:
    """One system."""

    system: str
    gpu_hours: float
    attainment: float
    """Share of the requests within the limits, by their mean time per token; those that do not end count as late."""
    goodput: float
    """Tokens per second of such requests."""
    goodput_device: float
    """The same for each device that is paid for, mean."""
    tpot_p99_s: float
    ttft_p50_s: float
    ttft_p99_s: float
    requests: int
    steps: int
    changes: int
    least: int
    """Devices."""
    most: int
    devices: Floats
    """[windows]"""
    plans: tuple[str, ...]
    """Names of those that were used."""

    def as_dict(self) -> dict[str, object]:
        return {**vars(self), "devices": self.devices.tolist(), "plans": list(self.plans)}


@dataclass(frozen=True)
class Day:
    """A scenario, ready for any system."""

    scenario: Scenario
    systems: Systems
    requests: Requests
    demand: Demand
    slo: Slo
    windows: int
    peak: float
    """Requests per second."""


def prepare(scenario: Scenario, hardware: Hardware, show: Show = lambda *_: None) -> Day:
    """Tables, settings of all systems, and requests. Raises ConfigError, ModelError, BadArrivals, OSError."""
    mesh, traffic = scenario.mesh, scenario.traffic
    sizes = read_sizes(scenario.folder / mesh.model)
    routing = synthetic(sizes.experts, sizes.top_k, mesh.zipf, mesh.used)
    setting = assemble(hardware, sizes, mesh.names, routing, most=mesh.most, show=show)
    systems = systems_of(setting, routing, scenario.rules, mesh.most, show)
    slo = Slo(traffic.slo_tpot_s, traffic.slo_ttft_s or np.inf)
    demand = Demand(1.0, traffic.prompt, traffic.output)
    if traffic.arrivals:
        requests = recorded(scenario.folder / traffic.arrivals, MOST_CONTEXT)
        demand = Demand(1.0, float(requests.prompts.mean()), float(requests.outputs.mean()))
        span, peak = float(requests.times[-1]) + 1, 0.0
    else:
        span, peak = traffic.hours * 3600, traffic.peak or traffic.peak_share * largest(systems, demand, slo)
        requests = day(peak, traffic.peak_to_mean, traffic.hours, traffic.prompt, traffic.output, traffic.seed)
    windows = int(np.ceil(span / scenario.scaling.window_s))
    peak = peak or float(requests.rates(scenario.scaling.window_s, windows).max())
    return Day(scenario, systems, requests, demand, slo, windows, peak)


def largest(systems: Systems, demand: Demand, slo: Slo) -> float:
    """Requests per second that the largest tier serves within the limits, to a percent."""
    choose = chooser(systems, TIERS, demand, slo)
    if choose(LEAST_RATE) is None:
        raise Unservable
    low, high = LEAST_RATE, 1.0
    while choose(high):
        low, high = high, 2 * high
    while high - low > 0.01 * high:
        middle = (low + high) / 2
        low, high = (middle, high) if choose(middle) else (low, middle)
    return low


def scheduled(day: Day, system: str) -> Schedule:
    """What one system decides, window by window."""
    scaling = day.scenario.scaling
    rates = forecast(day.requests.rates(scaling.window_s, day.windows), scaling.headroom)
    return decide(chooser(day.systems, system, day.demand, day.slo), rates, scaling.window_s, scaling.start_s)


def simulate(day: Day, system: str) -> Simulated:
    """A whole day of one system."""
    scaling, requests = day.scenario.scaling, day.requests
    schedule = scheduled(day, system)
    setting = day.systems.settings[system]
    tables = np.stack([times_of(setting, plan, day.demand) for plan in schedule.plans])
    rooms = np.stack([room_of(setting, plan, day.demand) for plan in schedule.plans])
    ends = day.windows * scaling.window_s + 3600.0
    first, last, steps, _ = serve(
        requests.times, requests.prompts, requests.outputs, schedule.starts, schedule.used, BATCHES, CHUNKS, tables,
        rooms, ends,
    )  # fmt: skip
    return _outcome(day, system, schedule, first, last, steps)


def _outcome(day: Day, system: str, schedule: Schedule, first: Floats, last: Floats, steps: int) -> Simulated:
    requests = day.requests
    tpot = (last - first) / np.maximum(1, requests.outputs - 1)
    late = np.where(np.isnan(tpot), np.inf, tpot)
    waits = np.where(np.isnan(first), np.inf, first - requests.times)
    kept = (late <= day.slo.tpot_s) & (waits <= day.slo.ttft_s)
    devices = np.array([schedule.plans[i].devices for i in schedule.used], np.float64)
    span = day.windows * day.scenario.scaling.window_s
    goodput = float(requests.outputs[kept].sum() / span)
    return Simulated(
        system=system,
        gpu_hours=float(schedule.paid.sum() / 3600),
        attainment=float(kept.mean()),
        goodput=goodput,
        goodput_device=goodput / float(schedule.paid.sum() / span),
        tpot_p99_s=float(np.quantile(late, 0.99)),
        ttft_p50_s=float(np.quantile(waits, 0.5)),
        ttft_p99_s=float(np.quantile(waits, 0.99)),
        requests=len(requests.times),
        steps=int(steps),
        changes=schedule.changes,
        least=int(devices.min()),
        most=int(devices.max()),
        devices=devices,
        plans=tuple(plan.name for plan in schedule.plans),
    )
