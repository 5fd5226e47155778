"""How long does a search take, is it exact, and what would it choose in the paper's setting, beside other systems' rules?

    python bench/planning.py [--repeats 5] [--random 200]

Nothing here runs on a GPU: times are computed by shared/perf_model.py from published peaks (shared/planning/hardware.toml);
shared/planning/inputs.toml holds the paper's setting and the rivals' rules. First the time of a search in 64 x 64 instances
with tables ready, then its distance from the optimum of all candidates in random settings, then plans and tokens per second
and device for given batches beside the rivals', with every coefficient halved and doubled, then where monoliths win. The
last line is one JSON object.
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
from shared.planning.assemble import Names, assemble
from shared.planning.hardware import Hardware, load_hardware
from shared.planning.plan import Plan
from shared.planning.rivals import NAMES, OURS, Rules, Systems, systems_of
from shared.planning.routing import Routing, synthetic
from shared.planning.search import look_at_all, search, space_of
from shared.planning.setting import Demand, Setting, Slo
from shared.planning.sizes import Sizes, read_sizes

CONFIGS = Path(__file__).with_name("configs")
INPUTS = Path(__file__).parents[1] / "shared" / "planning" / "inputs.toml"
FACTORS = (0.5, 2.0)


class Paper:
    """The paper's setting, as inputs.toml states it."""

    def __init__(self, inputs: dict[str, Any]) -> None:
        self.facts = inputs["paper"]
        self.rules = Rules(**{name: tuple(v) if isinstance(v, list) else v for name, v in inputs["rules"].items()})
        self.sizes: Sizes = read_sizes(CONFIGS / f"{self.facts['model']}.json")
        self.routing: Routing = synthetic(self.sizes.experts, self.sizes.top_k, self.facts["zipf"], self.facts["used"])
        device = self.facts["hardware"]
        self.names = Names(device, device, self.facts["link"], self.facts["per_node"], self.facts["apart"])
        self.slo = Slo(self.facts["slo_tpot_s"])
        self.demand = Demand(1.0, self.facts["prompt"], self.facts["output"])
        self.most: int = self.facts["most"]

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
        batch: {name: systems.choose(name, paper.demand, paper.slo, batch) for name in NAMES}
        for batch in paper.facts["batches"]
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
                print(f"{title:>24} {batch:>4} {name:>18}  none keeps the limit", flush=True)
                continue
            ratio = f"{beside[name]:.2f}x" if beside.get(name) else ""
            print(
                f"{title:>24} {batch:>4} {name:>18}  {plan.name:<26} {plan.devices:>3} devices  "
                f"{plan.tpot_s * 1e3:6.1f} ms  {plan.tokens_per_s_device:7.1f} tokens/s/device  a_max {plan.a_max:5.2f}"
                f"  {ratio}",
                flush=True,
            )


def scaled(hardware: Hardware) -> Iterator[tuple[str, Hardware]]:
    """The catalogue with each share, overhead and link halved and doubled."""
    for factor in FACTORS:
        for group in ("shares", "overheads"):
            for name, value in vars(getattr(hardware, group)).items():
                if name != "memory":
                    changed = replace(getattr(hardware, group), **{name: value * factor})
                    yield f"{name} x {factor:g}", replace(hardware, **{group: changed})


def regimes(paper: Paper, hardware: Hardware) -> dict[str, Any]:
    """What the planner recommends where disaggregation may lose: a model that one device holds, few requests, slow links."""
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
    paper, hardware = Paper(tomllib.loads(INPUTS.read_text())), load_hardware()
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


def sensitivity(paper: Paper, hardware: Hardware, systems: Systems) -> dict[str, dict[int, dict[str, float | None]]]:
    """Ratios with each coefficient halved and doubled, the same for every system."""
    result = {}
    for title, changed in scaled(hardware):
        again = paper.setting(changed, systems.settings[OURS].tables)
        settings = {
            name: replace(given, costs=again.costs, fabric=again.fabric) for name, given in systems.settings.items()
        }
        found = compare(replace(systems, settings=settings), paper)
        result[title] = {batch: ratios(plans) for batch, plans in found.items()}
        ours = ", ".join(f"{plans[OURS].name}" for plans in found.values() if plans[OURS])
        cells = "  ".join(
            "/".join(f"{ratio:.2f}" if ratio else "-" for ratio in row.values()) for row in result[title].values()
        )
        print(f"{title:>24}  {cells}  ({ours})", flush=True)
    return result


if __name__ == "__main__":
    main()
