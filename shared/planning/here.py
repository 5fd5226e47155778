"""How many instances this very mesh needs: the search of search.py, with coefficients fitted to it. Pure.

What a fit has not seen is not planned with: there are no more instances of a pool than were measured, no monoliths, and
no second micro-batch.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from shared.perf_model import Load
from shared.planning.amax import Amax
from shared.planning.exchange import CHOSEN
from shared.planning.fit import Fitted, Point
from shared.planning.memory import Room, attention_bytes
from shared.planning.plan import Plan
from shared.planning.report import binding, binds, breaks
from shared.planning.search import Space, search, space_of
from shared.planning.setting import Demand, Mesh, Setting, Slo, mesh_step

MOST = 64
"""Instances of a pool, which is also what a placement takes."""


@dataclass(frozen=True)
class Choice:
    """What ``choose`` has found."""

    plan: Plan | None
    """The fewest (or cheapest) instances that keep the limits; None: nothing does."""
    why: str
    """Why nothing smaller will do, or, without a plan, what binds and which candidate comes nearest; a line."""
    nearest: Plan | None
    """That candidate."""


def setting_here(
    fitted: Fitted, tables: Amax, attention_price: float = 1.0, expert_price: float = 1.0, cache: float = np.inf
) -> Setting:
    """What is planned for, by fitted coefficients.

    Args:
        tables: their slots are what limits an expert instance.
        cache: bytes of an attention instance that are planned with.
    """
    room = Room(cache, np.inf, tables.slots)
    return Setting(
        fitted.sizes, fitted.costs(), fitted.exchange, room, tables, tables, attention_price, expert_price, CHOSEN
    )


def space_here(
    fitted: Fitted, setting: Setting, attention: tuple[int, int] = (1, MOST), experts: tuple[int, int] = (1, MOST)
) -> Space:
    """Every candidate with so many instances (least, most) of either pool, of those that were measured."""
    space = space_of(setting, max(fitted.most_attention, fitted.most_experts), (1,), monoliths=False)
    inside = (space.attention >= attention[0]) & (space.attention <= min(attention[1], fitted.most_attention))
    inside &= (space.experts >= experts[0]) & (space.experts <= min(experts[1], fitted.most_experts))
    return space.at(np.flatnonzero(inside))


def choose(
    fitted: Fitted,
    tables: Amax,
    demand: Demand,
    slo: Slo,
    attention: tuple[int, int] = (1, MOST),
    experts: tuple[int, int] = (1, MOST),
    attention_price: float = 1.0,
    expert_price: float = 1.0,
    sequences: float = np.inf,
) -> Choice:
    """The fewest instances whose predicted times keep the limits at this demand; the cheapest, where prices differ.

    Args:
        attention, experts: least and most instances of either pool.
        sequences: that one attention instance decodes at most, by its cache or its settings.
    """
    cache = float(
        attention_bytes(fitted.sizes, np.array(sequences), demand.context, np.array(sequences + demand.chunk))
    )
    setting = setting_here(fitted, tables, attention_price, expert_price, cache)
    space = space_here(fitted, setting, attention, experts)
    if not len(space.attention):
        measured = f"{fitted.most_attention}A{fitted.most_experts}E"
        return Choice(None, f"no size is allowed that was measured and holds every expert (up to {measured})", None)
    found = search(setting, space, demand, slo, top=1)
    if found.best or found.binding is None:
        return Choice(found.best, binding(found), found.binding)
    near = found.binding
    return Choice(None, f"{binds(near)}: the nearest is {near.name}: {breaks(near)}", near)


def predicted(fitted: Fitted, tables: Amax, points: Sequence[Point]) -> list[float]:
    """Seconds per token of measured steps, by the model."""
    setting = setting_here(fitted, tables)
    return [float(mesh_step(setting, *_step_of(setting, point)).step.seconds[0]) for point in points]


def _step_of(setting: Setting, point: Point) -> tuple[Load, Mesh]:
    batch, none = np.array([float(point.batch)]), np.zeros(1)
    load = Load(batch, none, setting.sizes.attended(point.context), 0.0)
    return load, Mesh(np.array([float(point.attention)]), np.array([float(point.experts)]), 1)
