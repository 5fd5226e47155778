"""What this very mesh needs: the fewest instances of those that were measured, as a look at all of them finds."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shared.planning.amax import Amax, bound_table
from shared.planning.here import choose, predicted
from shared.planning.setting import Demand, Slo
from tests.unit.fitted_cases import MODEL, TRUE, points, seconds

TABLES = bound_table(MODEL.experts, MODEL.top_k, MODEL.experts, 8)


def flat(tables: Amax, value: float) -> Amax:
    return replace(tables, values=np.full_like(tables.values, value))


def settled(attention: int, experts: int, demand: Demand, limit: float) -> float:
    """Seconds per token where Little's law holds, by small steps upwards; more than the limit as soon as that is clear.

    For a demand without prompts to speak of.
    """
    batch, tpot, before = 1.0, 0.0, -1.0
    known = sorted(TRUE.expert_s)
    of = replace(TRUE, expert_s={experts: float(np.interp(experts, known, [TRUE.expert_s[n] for n in known]))})
    while tpot <= limit and tpot - before > 1e-9:
        before = tpot
        a_max = float(TABLES.look(np.array([experts]), np.array([batch])).mean())
        tpot = seconds(of, attention, experts, batch, demand.context, a_max)
        batch = max(1.0, demand.tokens * tpot)
    return tpot


@settings(max_examples=30, deadline=None)
@given(rate=st.floats(0.5, 60.0), limit=st.floats(0.03, 0.15))
def test_the_choice_is_the_smallest_of_all_that_keep_the_limit(rate: float, limit: float) -> None:
    demand = Demand(rate, 1e-6, 64.0)
    every = {(a, e): settled(a, e, demand, limit) for a in range(1, 5) for e in range(1, 9)}
    kept = {mesh: tpot for mesh, tpot in every.items() if tpot <= limit}
    plan = choose(TRUE, TABLES, demand, Slo(limit)).plan
    assert (plan is None) == (not kept)
    if plan:
        fewest = min(a + e for a, e in kept)
        assert plan.devices == fewest and (plan.attention, plan.experts) in kept
        assert plan.tpot_s == pytest.approx(min(t for (a, e), t in kept.items() if a + e == fewest), rel=1e-3)
        assert plan.batch == pytest.approx(max(1.0, demand.tokens * plan.tpot_s), rel=1e-3)


def test_a_measured_step_is_predicted_by_the_coefficients_that_made_it() -> None:
    for point in points(TRUE):
        [told] = predicted(TRUE, flat(TABLES, point.a_max), [point])
        assert told == pytest.approx(point.step_s, rel=1e-9)


def test_only_sizes_that_were_measured_and_are_allowed_are_chosen() -> None:
    demand, slo = Demand(10.0, 16.0, 64.0), Slo(0.2)
    free = choose(TRUE, TABLES, demand, slo).plan
    assert free and free.attention <= 4 and free.experts <= 8
    more = choose(TRUE, TABLES, demand, slo, attention=(3, 64), experts=(6, 64)).plan
    assert more and (more.attention, more.experts) == (3, 6)
    none = choose(TRUE, TABLES, demand, slo, attention=(5, 64))
    assert none.plan is None and "up to 4A8E" in none.why


def test_why_nothing_smaller_will_do_is_said() -> None:
    tight = choose(TRUE, TABLES, Demand(10.0, 16.0, 64.0), Slo(0.085))
    assert tight.plan and tight.plan.devices > 2
    assert "would cost less, but" in tight.why and tight.nearest
    never = choose(TRUE, TABLES, Demand(10.0, 16.0, 64.0), Slo(1e-3))
    assert never.plan is None and "TPOT" in never.why and never.nearest


def test_a_limit_on_the_first_token_counts() -> None:
    demand = Demand(5.0, 64.0, 64.0)
    free = choose(TRUE, TABLES, demand, Slo(1.0)).plan
    assert free
    strict = choose(TRUE, TABLES, demand, Slo(1.0, free.ttft_s * 0.8))
    assert strict.plan is None or strict.plan.ttft_s <= free.ttft_s * 0.8


def test_an_attention_instance_gets_no_more_sequences_than_it_holds() -> None:
    demand, slo = Demand(5.0, 16.0, 64.0), Slo(0.2)
    free, tight = (choose(TRUE, TABLES, demand, slo, sequences=most).plan for most in (np.inf, 16.0))
    assert free and tight and free.batch / free.attention > 16
    assert tight.batch / tight.attention <= 16 and tight.devices >= free.devices


def test_dear_experts_are_replaced_by_attention() -> None:
    demand, slo = Demand(10.0, 16.0, 64.0), Slo(0.1)
    cheap, dear = (choose(TRUE, TABLES, demand, slo, expert_price=price).plan for price in (1.0, 50.0))
    assert cheap and dear and dear.experts <= cheap.experts
