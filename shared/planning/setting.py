"""What is planned for: a model on devices and links, what is asked of it, and the step of any candidate. Pure.

A *mesh* has attention and expert instances, one device each; a *monolith* is a unit of devices that hold the whole
model together (data-parallel attention, each expert once), as often as needed. ``moemesh up --monolith`` is a unit of
one.
"""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from shared.perf_model import (
    Costs,
    Load,
    Step,
    Times,
    attention_seconds,
    experts_seconds,
    own_rows,
    shared_seconds,
    step,
)
from shared.planning.amax import Amax
from shared.planning.exchange import ALL_TO_ALL, OURS, Fabric, Measured, Traffic, Way, cheapest
from shared.planning.memory import Room
from shared.planning.sizes import Sizes

Floats = NDArray[np.float64]
SUM_BYTES = 4
"""Of one value of a sum on its way back (``partial`` combine: fp32)."""


@dataclass(frozen=True)
class Demand:
    """What requests ask for, in the mean."""

    rate: float
    """Requests per second."""
    prompt: float
    """Tokens."""
    output: float
    """Tokens."""
    chunk: float = 512.0
    """Tokens of prompts that an attention instance computes in a step at most."""

    @property
    def context(self) -> float:
        """Positions before a token of the output, in the mean (S)."""
        return self.prompt + self.output / 2

    @property
    def tokens(self) -> float:
        """Of the output, per second."""
        return self.rate * self.output


@dataclass(frozen=True)
class Slo:
    """Seconds that means may take; infinite: any."""

    tpot_s: float
    ttft_s: float = np.inf


@dataclass(frozen=True)
class Setting:
    """One model on one kind of device for each pool."""

    sizes: Sizes
    costs: Costs
    fabric: Fabric | Measured
    room: Room
    tables: Amax
    """Of expert instances."""
    units: Amax
    """Of monoliths: each expert once, on as many devices as the entry says."""
    attention_price: float = 1.0
    """Of one attention instance."""
    expert_price: float = 1.0
    ways: tuple[Way, ...] = OURS
    monolith: "Setting | None" = None
    """What monoliths are made of, where it is something else: devices of other costs. None: this."""


class Mesh(NamedTuple):
    """Candidates [n]: instances of both pools, and one number of micro-batches for all."""

    attention: Floats
    experts: Floats
    micro_batches: int

    @property
    def devices(self) -> Floats:
        return self.attention + self.experts

    def at(self, order: NDArray[np.int64]) -> "Mesh":
        return Mesh(self.attention[order], self.experts[order], self.micro_batches)


class Monolith(NamedTuple):
    """Candidates [n]: so many units of so many devices."""

    units: Floats
    size: Floats

    @property
    def devices(self) -> Floats:
        return self.units * self.size

    def at(self, order: NDArray[np.int64]) -> "Monolith":
        return Monolith(self.units[order], self.size[order])


class Outcome(NamedTuple):
    """A step of every candidate, [n], and what the exchange and the experts had to do with it."""

    step: Step
    a_max: Floats
    """Mean over layers, of one micro-batch."""
    way: NDArray[np.int64]
    """Which of the setting's ways."""


def load_of(setting: Setting, demand: Demand, batch: Floats) -> Load:
    """Rows of a step with so many sequences: each step, prompts come in at the rate at which outputs end."""
    attended = setting.sizes.attended
    prompts = batch * demand.prompt / demand.output
    return Load(batch, prompts, attended(demand.context), attended(demand.prompt / 2))


def mesh_step(setting: Setting, load: Load, mesh: Mesh) -> Outcome:
    """One step of each candidate."""
    sizes, costs = setting.sizes, setting.costs
    part = load.part(1 / mesh.micro_batches)
    a_max = setting.tables.look(mesh.experts, part.rows)
    exchange, way = exchange_seconds(setting, mesh, part.rows)
    parts = Times(
        attention_seconds(costs, part, mesh.attention),
        shared_seconds(costs, own_rows(part.rows, mesh.attention)),
        experts_seconds(costs, a_max, part.rows * sizes.top_k / mesh.experts, mesh.experts),
        exchange,
    )
    stands_for = setting.tables.weights(len(sizes.moe_layers))
    done = step(costs, load, mesh.attention, parts, stands_for, mesh.micro_batches)
    return Outcome(done, stands_for @ a_max / stands_for.sum(), way)


def exchange_seconds(setting: Setting, mesh: Mesh, rows: Floats) -> tuple[Floats, NDArray[np.int64]]:
    """Seconds of an exchange beside the experts' own time [n], and its way, as a number among the setting's [n]."""
    if isinstance(setting.fabric, Measured):
        return setting.fabric.seconds(mesh.attention, mesh.experts, rows), np.zeros(len(rows), np.int64)
    return cheapest(setting.fabric, mesh.attention, mesh.experts, traffic(setting, rows), setting.ways)


def monolith_step(setting: Setting, load: Load, monolith: Monolith) -> Outcome:
    """One step of each candidate; its units share requests evenly. Experts and shared experts wait for each other."""
    setting = setting.monolith or setting
    sizes, costs = setting.sizes, setting.costs
    mine = Load(
        np.maximum(1.0, load.decode / monolith.units), load.prefill / monolith.units, load.context, load.prefill_context
    )
    a_max = setting.units.look(monolith.size, mine.rows)
    attention = attention_seconds(costs, mine, monolith.size)
    shared = shared_seconds(costs, own_rows(mine.rows, monolith.size))
    experts = experts_seconds(costs, a_max, mine.rows * sizes.top_k / monolith.size, monolith.size)
    parts = Times(attention + shared, np.zeros_like(shared), experts, all_to_all(setting, monolith.size, mine.rows))
    stands_for = setting.units.weights(len(sizes.moe_layers))
    done = step(costs, mine, monolith.size, parts, stands_for)
    moe = len(sizes.moe_layers)
    split = done._replace(attention=done.attention - moe * shared, shared=moe * shared)
    return Outcome(split, stands_for @ a_max / stands_for.sum(), np.zeros(len(a_max[0]), np.int64))


def all_to_all(setting: Setting, size: Floats, rows: Floats) -> Floats:
    """The exchange inside of a unit: every device sends rows to all others that need them; nothing for a single one."""
    others = np.maximum(1.0, size - 1)
    fabric = setting.fabric
    assert isinstance(fabric, Fabric), "what was measured here was no monolith"
    inside = fabric._replace(between=fabric.inside, apart=True)
    near, _ = cheapest(inside, size, others, traffic(setting, rows), ALL_TO_ALL)
    far, _ = cheapest(fabric._replace(apart=True), size, others, traffic(setting, rows), ALL_TO_ALL)
    return np.where(size == 1, 0.0, np.where(size <= fabric.per_node, near, far))


def traffic(setting: Setting, rows: Floats) -> Traffic:
    """What an exchange of so many rows moves."""
    sizes = setting.sizes
    return Traffic(rows, sizes.top_k, sizes.hidden * sizes.value_bytes, sizes.hidden * SUM_BYTES)
