"""What a search has found, in words: the plan, what binds, and, where nothing will do, what would. Pure."""

import numpy as np

from shared.planning.amax import bound
from shared.planning.plan import Plan
from shared.planning.search import Found
from shared.planning.setting import Setting, Slo


def chosen(plan: Plan, setting: Setting) -> list[str]:
    """A plan in a few lines."""
    sizes, part = setting.sizes, np.array([plan.rows / plan.micro_batches])
    most = bound(sizes.experts, sizes.top_k, np.array([float(plan.experts)]), part)[0]
    batch = f"{plan.batch:.0f} sequences" if plan.batch >= 1.5 else "one sequence"
    lines = [
        f"{plan.name}: {plan.devices} device{'s' * (plan.devices > 1)}, price {plan.price:g}, {batch} in decode",
        f"{plan.tpot_s * 1e3:.1f} ms per token, {plan.ttft_s * 1e3:.0f} ms to the first one, "
        f"{plan.tokens_per_s:.0f} tokens/s, {plan.tokens_per_s_device:.1f} for each device",
        "a step: " + ", ".join(f"{name} {seconds * 1e3:.1f} ms" for name, seconds in plan.parts.items())
        + " (what others hide is counted in full)",
        f"a_max {plan.a_max:.1f} (bound for experts that are alike: {most:.1f}), exchanges go {plan.way}"
        + (f", memory of attention {plan.memory:.0%} used" if plan.memory else ""),
    ]  # fmt: skip
    if plan.kind == "mesh":
        lines.append(f"{plan.slots} slots per layer and expert instance: {plan.homes:.2f} homes for each expert")
    elif plan.experts > 1:
        lines.append(
            "a unit of several devices: expert parallelism inside of one server, which moemesh does not do itself"
        )
    return lines


def binding(found: Found) -> str:
    """Why nothing cheaper will do."""
    if found.best is None or found.binding is None:
        return "nothing smaller holds the model" if found.best else ""
    return f"{found.binding.name} would cost less, but {breaks(found.binding)}"


def breaks(plan: Plan) -> str:
    """The worst limit that a plan breaks, in words."""
    worst = next(iter(_told(plan)), "")
    return {
        "rate": "it cannot keep up with the requests",
        "memory": f"weights and cache need {plan.memory:.2f} times the memory of an instance",
        "TPOT": f"a token would take {plan.tpot_s * 1e3:.1f} ms",
        "TTFT": f"the first token would take {plan.ttft_s * 1e3:.0f} ms",
        "": "it keeps all limits",
    }[worst]


def _told(plan: Plan) -> tuple[str, ...]:
    """The limits that it breaks, worst first. Where requests pile up the first token never comes: that says nothing."""
    named = tuple(name for name in plan.broken if name != "TTFT" or np.isfinite(plan.ttft_s))
    return named if named or not plan.broken else ("rate",)


def binds(plan: Plan) -> str:
    """Which limits keep a plan from being one."""
    named = _told(plan)
    return f"{', '.join(named)} {'bind' if len(named) > 1 else 'binds'}"


def infeasible(found: Found, slo: Slo, rate: float) -> str:
    """What binds where nothing will do, and the nearest that would. ``rate``: the highest that can be served, or 0."""
    near = found.binding
    if near is None:
        return "there are no candidates: more instances are needed to hold the experts"
    asked = f"{slo.tpot_s * 1e3:g} ms per token"
    if np.isfinite(slo.ttft_s):
        asked += f" and {slo.ttft_s * 1e3:g} ms to the first"
    nearest = f"the nearest is {near.name}: {breaks(near)}"
    if {"rate", "memory"} & set(near.broken):
        nearest += f"; up to {rate:.3g} requests/s would do" if rate else "; no rate would do"
    else:
        relaxed = f"--slo-tpot-ms {np.ceil(near.tpot_s * 1e4) / 10:g}"
        if near.excess["TTFT"] > 1:
            relaxed += f" --slo-ttft-ms {np.ceil(near.ttft_s * 1e3):g}"
        nearest += f" (feasible: {relaxed}" + (f", or {rate:.3g} requests/s at most)" if rate else ")")
    return f"no plan keeps {asked}; {binds(near)}: {nearest}"
