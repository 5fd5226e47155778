"""Other systems' rules: each takes only what its rule allows, with its own choice of replicas and its own exchange."""

import numpy as np
import pytest

from shared.planning.exchange import ALL_TO_ALL
from shared.planning.outlook import PARTS
from shared.planning.rivals import BALANCED, COARSE, NAMES, OURS, TIERS, Rules, Systems, systems_of
from shared.planning.routing import synthetic
from shared.planning.search import look_at, space_of
from shared.planning.setting import Demand, Slo
from tests.unit.planning_cases import deepseek, setting

DEMAND, SLO = Demand(20, 16, 256), Slo(0.2)
MOST = 16


@pytest.fixture(scope="module")
def systems() -> Systems:
    routing = synthetic(160, 6, 0.6)
    return systems_of(setting(deepseek(), routing=routing, most=MOST), routing, Rules(), MOST)


def test_tiers_are_monoliths_of_the_sizes_that_hold_the_model(systems: Systems) -> None:
    plan = systems.choose(TIERS, DEMAND, SLO)
    assert plan is not None and plan.kind == "monolith"
    assert (plan.attention, plan.devices) == (1, 16)


def test_units_of_four_are_units_of_four_in_both_pools(systems: Systems) -> None:
    plan = systems.choose(COARSE, DEMAND, SLO)
    assert plan is not None and (plan.attention, plan.experts) == (4, 8)


def test_a_balanced_mesh_has_attention_and_experts_as_even_as_its_experts_allow(systems: Systems) -> None:
    plan = systems.choose(BALANCED, DEMAND, SLO)
    assert plan is not None
    given = systems.settings[BALANCED]
    space = space_of(given, MOST, (1,), monoliths=False)
    parts = look_at(given, space, DEMAND, SLO).parts
    ratio = (parts[PARTS.index("attention")] + parts[PARTS.index("shared")]) / parts[PARTS.index("experts")]
    mine = space.experts == plan.experts
    nearest = space.attention[mine][np.argmin(np.abs(np.log(ratio[mine])))]
    assert plan.attention == nearest


def test_rivals_gate_on_the_attention_side_and_activate_more_experts(systems: Systems) -> None:
    at = np.array([MOST]), np.array([32.0])
    ours, balanced, coarse = (systems.settings[name].tables.look(*at)[0, 0] for name in (OURS, BALANCED, COARSE))
    assert ours < balanced < coarse
    assert systems.settings[BALANCED].ways == systems.settings[COARSE].ways == ALL_TO_ALL


@pytest.mark.parametrize("name", NAMES)
def test_every_system_refuses_what_it_cannot_keep(systems: Systems, name: str) -> None:
    assert systems.choose(name, DEMAND, Slo(0.001)) is None


@pytest.mark.parametrize("batch", [64, 512])
def test_with_a_given_batch_ours_serves_most_per_device(systems: Systems, batch: float) -> None:
    plans = {name: systems.choose(name, DEMAND, SLO, batch) for name in NAMES}
    served = {name: plan.tokens_per_s_device if plan else 0.0 for name, plan in plans.items()}
    assert max(served, key=lambda name: served[name]) == OURS
