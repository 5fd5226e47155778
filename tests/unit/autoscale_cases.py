"""A mesh of made-up speed for the tests of autoscaling: the demo model's shape, coefficients of no device."""

from functools import cache
from pathlib import Path

import numpy as np

from services.scheduler.autoscale_settings import Profile
from services.scheduler.autoscaling import A, E, Rules
from services.scheduler.planner import Planner
from services.scheduler.traffic import Traffic
from shared.load_messages import WAIT_EDGES, Served, Waits
from shared.models.source import open_source
from shared.planning.exchange import Measured
from shared.planning.fit import Fitted
from shared.planning.fitted_file import save_fitted
from shared.planning.routing import synthetic
from shared.planning.setting import Slo
from shared.planning.sizes import sizes_of
from shared.traces.native import Header, TraceWriter

EXPERT_S = 2e-3
"""Of an activated expert: what makes the expert pool's size matter."""
ROW_S = 0.5e-3
"""Of a row of an attention instance, in each layer."""
MOST = 3


def fitted(most: int = MOST, expert_s: float = EXPERT_S, row_s: float = ROW_S) -> Fitted:
    """Of meshes with at most so many instances in each pool."""
    sizes = sizes_of(open_source("").spec, "demo")
    betas = dict.fromkeys(range(1, most + 1), expert_s)
    return Fitted(
        sizes, "", most, most, step_s=2e-3, row_s=0.0, token_s=0.0, member_s=0.0, floor_s=0.0, attention_row_s=row_s,
        position_s=0.0, experts_s=0.5e-3, expert_s=betas, part_s=0.0, exchange=Measured(1e-3, 0.0, 0.0, 0.0),
    )  # fmt: skip


def rules(least_experts: int = 1, most: int = MOST, tpot_s: float = 0.2, ttft_s: float = np.inf) -> Rules:
    slo = Slo(tpot_s, ttft_s)
    return Rules({A: 1, E: least_experts}, {A: most, E: most}, slo, window_s=10.0, cooldown_s=60.0, idle_s=100.0)


@cache
def planner(least_experts: int = 1) -> Planner:
    routing = synthetic(32, 4, 0.6)
    return Planner(Profile(fitted(), routing, ""), 32, rules(least_experts))


def waits(count: int = 0, each_s: float = 0.0) -> Waits:
    counts = [0] * (len(WAIT_EDGES) + 1)
    counts[int(np.searchsorted(WAIT_EDGES, each_s))] = count
    return Waits(counts=tuple(counts), seconds=count * each_s)


def served(gateway: str = "g", incarnation: int = 1, seconds: float = 1.0, **facts: object) -> Served:
    """A report of nothing but ``facts``."""
    counts = "arrived", "prompt_tokens", "refused", "output_tokens", "ended", "ended_tokens", "open"
    times = {"inter": waits(), "first": waits()}
    identity = {"gateway": gateway, "incarnation": incarnation, "seconds": seconds}
    return Served.model_validate({**dict.fromkeys(counts, 0), **times, **identity, **facts})


def steady_traffic(rate: int, output: int, tpot_s: float, seconds: int = 30) -> Traffic:
    """Requests of 2 + ``output`` tokens that came and ended at this rate until now, which is ``seconds``."""
    traffic = Traffic(seconds, 0.0)
    tokens = rate * output
    for second in range(1, seconds + 1):
        traffic.add(
            served(
                arrived=rate, prompt_tokens=2 * rate, output_tokens=tokens, ended=rate, ended_tokens=tokens,
                open=round(tokens * tpot_s), inter=waits(tokens - rate, tpot_s), first=waits(rate, tpot_s),
            ),
            float(second),
        )  # fmt: skip
    return traffic


def write_profile(path: Path, of: Fitted, digest: str) -> None:
    """A profile, and a trace of synthetic routing beside it."""
    save_fitted(path, of, [], digest)
    header = Header(of.sizes.name, digest, of.sizes.experts, of.sizes.moe_layers)
    (ids,) = synthetic(of.sizes.experts, of.sizes.top_k, 0.6).rows
    with TraceWriter(path.with_suffix(".trace"), header) as writer:
        for layer in of.sizes.moe_layers:
            writer.append(layer, 0, ids[:4096])
