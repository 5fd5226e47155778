"""How long does a search take, is it exact, and what does it choose in the paper's setting, beside other systems?

    python bench/planning.py [--repeats 5] [--random 200]

Nothing here runs on a GPU: times are computed by shared/perf_model.py from published peaks, which stand in
shared/planning/hardware.toml; the paper's setting and the rivals' rules stand in bench/configs/paper.toml. First the
time of a search in 64 x 64 instances with tables ready, then its distance from the optimum of all candidates in random
settings, then plans and tokens per second and device for given batches beside the rivals', again with every coefficient
halved and doubled, then regimes where monoliths win. The last line is one JSON object.
"""

import argparse
import time
import tomllib
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from common import Bar, median, report

from shared.planning.amax import Amax
from shared.planning.assemble import assemble
from shared.planning.hardware import Hardware, load_hardware
from shared.planning.plan import Plan
from shared.planning.rivals import NAMES, OURS, PLAIN, Systems, systems_of
from shared.planning.routing import Routing, synthetic
from shared.planning.search import Space, look_at, look_at_all, search, space_of
from shared.planning.setting import Demand, Setting, Slo
from shared.planning.sizes import Sizes, read_sizes
from shared.simulation.scenario import NOTES, load_scenario

PAPER = Path(__file__).parent / "configs" / "paper.toml"
FACTORS = (0.5, 2.0)


class Paper:
    """The paper's setting, and what it reports of it."""

    def __init__(self, file: Path) -> None:
        self.scenario = load_scenario(file)
        self.reported: dict[str, Any] = tomllib.loads(file.read_text())[NOTES]
        mesh, traffic = self.scenario.mesh, self.scenario.traffic
        self.sizes: Sizes = read_sizes(self.scenario.folder / mesh.model)
        self.routing: Routing = synthetic(self.sizes.experts, self.sizes.top_k, mesh.zipf, mesh.used)
        self.names, self.most, self.rules = mesh.names, mesh.most, self.scenario.rules
        self.slo = Slo(traffic.slo_tpot_s)
        self.demand = Demand(1.0, traffic.prompt, traffic.output)

    def setting(self, hardware: Hardware, tables: Amax | None = None) -> Setting:
        return assemble(hardware, self.sizes, self.names, self.routing, most=self.most, tables=tables)


def parse() -> argparse.Namespace:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--repeats", type=int, default=5, help="of timed searches")
    p.add_argument("--random", type=int, default=200, help="random settings for the distance from the optimum")
    return p.parse_args()


def timed(setting: Setting, demand: Demand, repeats: int) -> dict[str, float]:
    """Seconds of a search in all candidates, median: where something cheap will do, and where nothing will."""
    space = space_of(setting, 64)
    result: dict[str, float] = {"candidates": float(len(space.attention))}
    for name, slo in (("found", Slo(0.05)), ("infeasible", Slo(0.001))):
        spent = []
        for _ in range(repeats):
            start = time.perf_counter()
            search(setting, space, demand, slo)
            spent.append(time.perf_counter() - start)
        result[name] = median(spent)
    return result


def distances(setting: Setting, count: int) -> list[float]:
    """How far the plan is from the optimum of all candidates, as a share, in random demands, limits and prices."""
    found = []
    for seed in range(count):
        rng = np.random.default_rng(seed)
        prices = rng.uniform(0.2, 3.0, 2)
        priced = replace(setting, attention_price=float(prices[0]), expert_price=float(prices[1]))
        demand = Demand(float(10 ** rng.uniform(-2, 2)), float(rng.uniform(1, 4000)), float(rng.uniform(1, 1000)))
        slo = Slo(float(10 ** rng.uniform(-1.6, -0.5)), float(rng.choice([np.inf, 2.0])))
        space = space_of(priced, 64)
        best = search(priced, space, demand, slo).best
        least = look_at_all(priced, space, demand, slo)
        cost = best.price / best.tokens_per_s if best else np.inf
        found.append(0.0 if cost == least else abs(cost / least - 1))
    return found


def compare(systems: Systems, paper: Paper) -> dict[int, dict[str, Plan | None]]:
    """Every system's plan for every batch."""
    return {
        batch: {name: systems.choose(name, paper.demand, paper.slo, batch) for name in (PLAIN, *NAMES)}
        for batch in paper.reported["batches"]
    }


def ratios(plans: dict[str, Plan | None]) -> dict[str, float | None]:
    """Our tokens per second and device beside each rival's; None: it has no plan."""
    ours = plans[OURS]
    assert ours is not None
    return {
        name: ours.tokens_per_s_device / plan.tokens_per_s_device if plan else None
        for name, plan in plans.items()
        if name != OURS
    }


def show(title: str, found: dict[int, dict[str, Plan | None]]) -> None:
    for batch, plans in found.items():
        beside = ratios(plans)
        for name, plan in plans.items():
            if plan is None:
                print(f"{title:>24} {batch:>4} {name:>20}  none keeps the limit", flush=True)
                continue
            ratio = f"{beside[name]:.2f}x" if beside.get(name) else ""
            print(
                f"{title:>24} {batch:>4} {name:>20}  {plan.name:<26} {plan.devices:>3} devices  "
                f"{plan.tpot_s * 1e3:6.1f} ms  {plan.tokens_per_s_device:7.1f} tokens/s/device  a_max {plan.a_max:5.2f}"
                f"  {ratio}",
                flush=True,
            )


def scaled(hardware: Hardware) -> Iterator[tuple[str, Hardware]]:
    """The catalogue with each share (that of links, too) and overhead halved and doubled."""
    for factor in FACTORS:
        for group in ("shares", "overheads"):
            for name, value in vars(getattr(hardware, group)).items():
                if name != "memory":
                    other = replace(getattr(hardware, group), **{name: value * factor})
                    yield f"{name} x {factor:g}", replace(hardware, **{group: other})


def regimes(paper: Paper, hardware: Hardware) -> dict[str, Any]:
    """What is recommended where disaggregation may lose: a model that one device holds and few requests; slow links."""
    result: dict[str, Any] = {}
    small = replace(paper.sizes, name="a tenth of its experts", experts=16)
    for title, sizes, device, link, rate in (
        ("a model that one device holds, 0.1 requests/s", small, "h200", "infiniband", 0.1),
        ("slow links (10 Gb/s), 20 requests/s", paper.sizes, "h200", "ethernet-10", 20.0),
        ("fast links, 20 requests/s", paper.sizes, "h200", "infiniband", 20.0),
    ):
        names = replace(paper.names, attention=device, experts=device, link=link)
        setting = assemble(hardware, sizes, names, None)
        demand = replace(paper.demand, rate=rate)
        found = search(setting, space_of(setting, paper.most), demand, Slo(0.06))
        kinds = {"mesh": found.mesh, "monolith": found.monolith}
        result[title] = {kind: f"{p.name}, {p.devices} devices" if p else "none" for kind, p in kinds.items()}
        result[title]["recommended"] = found.best.kind if found.best else "none"
        print(f"{title}: {result[title]}", flush=True)
    return result


def main() -> None:
    args = parse()
    paper, hardware = Paper(PAPER), load_hardware()
    start = time.perf_counter()
    setting = paper.setting(hardware)
    systems = systems_of(setting, paper.routing, paper.rules, paper.most)
    result: dict[str, Any] = {"tables_s": time.perf_counter() - start}
    result["search"] = timed(setting, replace(paper.demand, rate=20.0), args.repeats)
    print(f"search: {result['search']}", flush=True)
    far = distances(setting, args.random)
    result["distance"] = {"settings": len(far), "worst": max(far, default=0.0)}
    print(f"distance from the optimum: {result['distance']}", flush=True)
    found = compare(systems, paper)
    show("published peaks", found)
    result["paper"] = {
        batch: {"plans": {n: p and p.as_dict() for n, p in plans.items()}, "ratios": ratios(plans)}
        for batch, plans in found.items()
    }
    result["their_overhead"] = with_their_overhead(paper, hardware, systems)
    result["sensitivity"] = sensitivity(paper, hardware, systems)
    result["regimes"] = regimes(paper, hardware)
    slowest = max(result["search"]["found"], result["search"]["infeasible"])
    lost = [regime["recommended"] for regime in result["regimes"].values()][:2]
    report(
        "planning",
        result,
        [
            Bar("seconds of a search, 64 x 64 instances", slowest, 1.0, at_most=True),
            Bar("distance from the exact optimum, worst of random settings", max(far, default=0.0), 1e-9, at_most=True),
            Bar("regimes where the monolith is recommended, of 2", float(lost.count("monolith")), 2.0),
        ],
    )


def with_their_overhead(paper: Paper, hardware: Hardware, systems: Systems) -> dict[str, Any]:
    """The same with so much more time per layer that the first of their meshes takes what Little's law makes of their
    figures; and what that foretells of the others."""
    theirs = {name: batch / rate for name, batch, rate in paper.reported["meshes"]}
    first, *others = paper.reported["meshes"]
    more = (theirs[first[0]] - whole_step(systems, paper, first[0], first[1])) / len(paper.sizes.moe_layers)
    overheads = replace(hardware.overheads, experts_s=hardware.overheads.experts_s + more)
    again = changed(systems, paper, replace(hardware, overheads=overheads))
    foretold = {name: (whole_step(again, paper, name, batch), theirs[name]) for name, batch, _ in others}
    print(f"their overhead: {more * 1e3:.2f} ms per layer; foretold and reported seconds {foretold}", flush=True)
    found = compare(again, paper)
    show("with their overhead", found)
    return {
        "layer_s": more,
        "foretold_s": foretold,
        "plans": {batch: {n: p and p.name for n, p in plans.items()} for batch, plans in found.items()},
        "ratios": {batch: ratios(plans) for batch, plans in found.items()},
    }


def whole_step(systems: Systems, paper: Paper, name: str, batch: float) -> float:
    """Seconds per token of a mesh as the paper's: in whole steps, gates on the expert side. ``name``: like 1A6E."""
    attention, experts = (np.array([int(part)]) for part in name.removesuffix("E").split("A"))
    space = Space(attention, experts, np.array([1]))
    return float(look_at(systems.settings[PLAIN], space, paper.demand, paper.slo, batch).tpot[0])


def changed(systems: Systems, paper: Paper, hardware: Hardware) -> Systems:
    """All systems on other hardware; tables stay."""
    again = paper.setting(hardware, systems.settings[OURS].tables)
    settings = {n: replace(given, costs=again.costs, fabric=again.fabric) for n, given in systems.settings.items()}
    return replace(systems, settings=settings)


def sensitivity(paper: Paper, hardware: Hardware, systems: Systems) -> dict[str, dict[int, dict[str, float | None]]]:
    """Ratios with each coefficient halved and doubled, the same for every system."""
    result = {}
    for title, other in scaled(hardware):
        found = compare(changed(systems, paper, other), paper)
        result[title] = {batch: ratios(plans) for batch, plans in found.items()}
        ours = ", ".join(plan.name for plans in found.values() if (plan := plans[OURS]))
        cells = "  ".join(
            "/".join(f"{ratio:.2f}" if ratio else "-" for ratio in row.values()) for row in result[title].values()
        )
        print(f"{title:>24}  {cells}  ({ours})", flush=True)
    return result


if __name__ == "__main__":
    main()
