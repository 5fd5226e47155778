"""This mesh's speed, as the autoscaler asks for it: a profile, and tables of a_max that are made from it. Pure."""

import numpy as np

from services.scheduler.autoscale_settings import Profile
from services.scheduler.autoscaling import A, E, Rules, Sizes
from shared.errors import MoemeshError
from shared.planning.amax import monte_carlo
from shared.planning.here import Choice, choose, setting_here
from shared.planning.setting import Demand, Mesh, Slo, load_of, mesh_step


class CannotHold(MoemeshError):
    """As many expert instances as were profiled have too few slots for the model."""


class Planner:
    """Implements ``autoscaling.Model``.

    Args:
        slots: replicas of a layer on an expert instance; to make tables for it takes seconds.

    Raises CannotHold.
    """

    def __init__(self, profile: Profile, slots: int, rules: Rules) -> None:
        self.slots = slots
        self._rules = rules
        self._fitted = profile.fitted
        most, experts = self._fitted.most_experts, self._fitted.sizes.experts
        if slots * most < experts:
            held = f"{most} expert instances with {slots} slots per layer cannot hold {experts} experts"
            raise CannotHold(f"{held}, and more were not profiled: profile more, or give them more slots")
        self._tables = monte_carlo(profile.routing, slots, most)
        self._setting = setting_here(self._fitted, self._tables)

    @property
    def fewest(self) -> int:
        return self._tables.first

    def choose(self, demand: Demand, slo: Slo, seats: int) -> Choice:
        least, most = self._rules.least, self._rules.most
        bounds = (least[A], most[A]), (max(1, least[E]), most[E])
        return choose(self._fitted, self._tables, demand, slo, *bounds, sequences=seats)

    def tpot(self, sizes: Sizes, batch: float, demand: Demand) -> float:
        load = load_of(self._setting, demand, np.array([batch]))
        experts = min(max(sizes[E], self._tables.first), self._tables.most)
        mesh = Mesh(np.array([float(sizes[A])]), np.array([float(experts)]), 1)
        return float(mesh_step(self._setting, load, mesh).step.seconds[0])
