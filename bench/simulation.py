"""What would a day of requests cost under each system's rule, and how long does it take to simulate?

    python bench/simulation.py [--plots DIR] [--only day]

Everything is simulated: bench/configs/paper.toml is the scenario, shared/planning/hardware.toml has the published
peaks. First the scenario as it stands, whose rate has a peak of 7.5 times its mean, then with two micro-batches for the
rivals' meshes too, then a plain sine (twice its mean), then device-hours alone with every coefficient of hardware.toml
halved and doubled, the same for every system and the same requests. The last line is one JSON object.
"""

import argparse
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from common import Bar, report
from planning import scaled

from shared.planning.assemble import assemble
from shared.planning.deciding import Unservable
from shared.planning.hardware import Hardware, load_hardware
from shared.planning.rivals import BALANCED, COARSE, NAMES, OURS, TIERS
from shared.planning.sizes import read_sizes
from shared.simulation.plot import plot_day
from shared.simulation.run import Day, Simulated, prepare, scheduled, simulate
from shared.simulation.scenario import load_scenario

PAPER = Path(__file__).parent / "configs" / "paper.toml"
MILLION = 1e6


def parse() -> argparse.Namespace:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--plots", type=Path, help="directory for PNG files")
    p.add_argument("--only", choices=("day",), help="leave out the plain sine and sensitivity")
    return p.parse_args()


def run(title: str, day: Day, plots: Path | None) -> dict[str, Simulated]:
    """All systems, with a line for each."""
    outcomes = {name: simulate(day, name) for name in NAMES}
    ours = outcomes[OURS].gpu_hours
    for name, row in outcomes.items():
        print(
            f"{title:>14} {name:>18}  {row.gpu_hours:8.1f} device-hours (ours {ours / row.gpu_hours:.2f} of it)  "
            f"{row.least} to {row.most} devices, {row.changes} changes  {row.attainment:.2%} in time  "
            f"p99 {row.tpot_p99_s * 1e3:.1f} ms per token, {row.ttft_p99_s * 1e3:.0f} ms to the first  "
            f"{row.goodput_device:.1f} tokens/s/device",
            flush=True,
        )
    if plots:
        plot_day(day, list(outcomes.values()), plots / f"simulation-{title.replace(' ', '-')}.png")
    return outcomes


def rows(outcomes: dict[str, Simulated]) -> dict[str, Any]:
    """For JSON, without the devices of every window."""
    return {name: {k: v for k, v in row.as_dict().items() if k != "devices"} for name, row in outcomes.items()}


def sensitivity(day: Day, hardware: Hardware) -> dict[str, dict[str, float]]:
    """Our device-hours as a share of each rival's; the same requests, tables and rules."""
    mesh, result = day.scenario.mesh, {}
    sizes = read_sizes(day.scenario.folder / mesh.model)
    for title, other in scaled(hardware):
        again = assemble(other, sizes, mesh.names, None, most=mesh.most)
        settings = {n: replace(s, costs=again.costs, fabric=again.fabric) for n, s in day.systems.settings.items()}
        changed = replace(day, systems=replace(day.systems, settings=settings))
        result[title] = _shares(changed)
        print(f"{title:>18}  {'  '.join(f'{n} {share:.2f}' for n, share in result[title].items())}", flush=True)
    return result


def _shares(day: Day) -> dict[str, float]:
    """NaN for who cannot serve anything."""
    ours, shares = scheduled(day, OURS).paid.sum(), {}
    for name in (TIERS, BALANCED, COARSE):
        try:
            shares[name] = float(ours / scheduled(day, name).paid.sum())
        except Unservable:
            shares[name] = float("nan")
    return shares


def main() -> None:
    args = parse()
    hardware, scenario = load_hardware(), load_scenario(PAPER)
    simulate_all = time.perf_counter()
    day = prepare(scenario, hardware)
    outcomes = run("paper", day, args.plots)
    seconds = time.perf_counter() - simulate_all
    requests = len(day.requests.times)
    print(f"{requests} requests, {len(NAMES)} systems: {seconds:.1f} s with compilation and tables", flush=True)
    result: dict[str, Any] = {"requests": requests, "seconds": seconds, "peak": day.peak, "paper": rows(outcomes)}
    if args.only is None:
        rules = replace(scenario.rules, micro_batches=2)
        pairs = replace(day, systems=replace(day.systems, rules=rules))
        result["rivals in micro-batches"] = rows(run("micro-batches", pairs, None))
        sine = replace(scenario, traffic=replace(scenario.traffic, peak=day.peak, peak_to_mean=2.0))
        result["plain sine"] = rows(run("plain sine", prepare(sine, hardware), args.plots))
        result["sensitivity"] = sensitivity(day, hardware)
    ours = outcomes[OURS]
    report(
        "simulation",
        result,
        [
            Bar("seconds for a million requests of 24 h, all systems", seconds * MILLION / requests, 60, at_most=True),
            Bar("device-hours beside monolithic tiers", ours.gpu_hours / outcomes[TIERS].gpu_hours, 0.61, at_most=True),
            Bar("device-hours beside balanced", ours.gpu_hours / outcomes[BALANCED].gpu_hours, 0.84, at_most=True),
            Bar("requests in time", ours.attainment, 0.99),
        ],
    )


if __name__ == "__main__":
    main()
