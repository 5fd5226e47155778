"""What do elastic experts bring on recorded routing and arrivals, beside static expert parallelism, EPLB and MoEless?

    python bench/replay.py --routing A.trace B.trace --predicted 'A-d{d}.trace' 'B-d{d}.trace' --arrivals X.csv Y.csv

One routing trace for each domain (`moemesh trace record`, `moemesh predictor apply`), predicted ones by distance,
arrivals as in the Azure LLM inference traces. Compares all policies in both profiles of shared/replay/inputs.toml and
in all forms of layer times, then sweeps V and d, leaves parts of `moemesh` out, and scales coefficients, on the first
arrival trace. Without data it says so and measures nothing. The last line is one JSON object.
"""

import argparse
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from common import Bar, report

from shared.replay.inputs import COEFFICIENTS, Inputs, load_inputs
from shared.replay.plot import plot_outcomes, plot_sweep
from shared.replay.policies import Parts, Settings
from shared.replay.run import Outcome
from shared.replay.session import Draw, Files, against, compare, form
from shared.replay.timing import Form
from shared.replay.work import Work

PROFILES, FORMS = ("local", "paper"), (Form.DEVICES, Form.SUMS)
THRESHOLDS, DISTANCES, FACTORS = (0.2, 0.4, 0.6, 0.8, 1.0), (1, 2, 3, 4, 5), (0.5, 2.0)
NO_PARTS = Parts(predictor=False, scaler=False, placer=False, keep_alive=False)
PAPERS = {
    "layer vs static": 0.568,
    "layer vs EPLB": 0.781,
    "proxy vs static": 0.073,
    "vs EPLB": 0.049,
    "vs Oracle": 0.159,
}
"""What MoEless reports, as ratios."""


def parse() -> argparse.Namespace:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--routing", type=Path, nargs="+", default=[], help="one trace for each domain")
    p.add_argument("--predicted", nargs="+", default=[], help="predicted ones in the same order; {d} is the distance")
    p.add_argument("--arrivals", type=Path, nargs="+", default=[], help="CSV files of requests")
    p.add_argument("--seconds", type=float, default=0.0, help="of the arrivals; 0: all")
    p.add_argument("--sweep-seconds", type=float, default=600.0, help="of the arrivals, in sweeps and ablations")
    p.add_argument("--plots", type=Path, help="directory for PNG files")
    p.add_argument("--only", choices=("compare", "sweeps"), help="a part of the bench")
    return p.parse_args()


def silent(_what: str, _share: float) -> None:
    """Benches print lines."""


def work_of(args: argparse.Namespace, arrivals: Path, inputs: Inputs, settings: Settings, draw: Draw) -> Work:
    predicted = tuple(Path(name.format(d=settings.distance)) for name in args.predicted)
    return form(Files(tuple(args.routing), predicted, arrivals), inputs, settings, draw, silent)


def rows_of(outcomes: dict[str, Outcome]) -> dict[str, dict[str, Any]]:
    return {name: outcome.as_dict() | against(outcome, outcomes) for name, outcome in outcomes.items()}


def show(title: str, rows: dict[str, dict[str, Any]]) -> None:
    for name, row in rows.items():
        print(
            f"{title:>28} {name:>22}  {row['layer_ms']:8.4f} ms  p99 {row['layer_ms_p99']:8.4f}  "
            f"closed {row['closed']:7.1%}  waited {row['waited_s']:7.1f} s  late {row['late_share']:.4f}  "
            f"residents {row['residents']:7.1f}  proxy {row['proxy_vs_static']:.3f}  "
            f"resident {row['resident_vs_static']:.3f} of static",
            flush=True,
        )


def cells(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Every profile, arrival trace and form: all policies, and `moemesh` with the memory that `paper` has used."""
    for profile in PROFILES:
        inputs = load_inputs(profile)
        for arrivals in args.arrivals:
            for kind in (*FORMS, Form.PAPER):
                settings = Settings(form=kind)
                work = work_of(args, arrivals, inputs, settings, Draw(args.seconds))
                outcomes = compare(work, inputs, settings, ("eplb", "paper", "moemesh"), silent)
                rows = rows_of(outcomes)
                budget = outcomes["paper"].residents / (work.layers(inputs) * work.experts)
                same = compare(
                    work, inputs, replace(settings, budget=budget, extra=max(0.1, budget - 1)), ("moemesh",), silent
                )
                rows["moemesh, paper's memory"] = rows_of(same)["moemesh"]
                show(f"{profile} {arrivals.stem[-4:]} {kind}", rows)
                if args.plots:
                    title = f"{profile}-{arrivals.stem}-{kind}"
                    plot_outcomes(list(outcomes.values()), title, args.plots / f"replay-{title}.png")
                yield {"profile": profile, "arrivals": arrivals.stem, "form": str(kind), "policies": rows}


def sweeps(args: argparse.Namespace) -> dict[str, Any]:
    """V and d as in the paper, parts on alone and off alone, coefficients halved and doubled; local, devices."""
    inputs, draw, arrivals = load_inputs("local"), Draw(args.sweep_seconds), args.arrivals[0]
    base = Settings()
    work = work_of(args, arrivals, inputs, base, draw)

    def run(settings: Settings, work: Work = work, inputs: Inputs = inputs, title: str = "") -> dict[str, Any]:
        rows = rows_of(compare(work, inputs, settings, ("paper", "moemesh"), silent))
        show(title, {name: rows[name] for name in ("paper", "moemesh")})
        return {name: rows[name] for name in ("paper", "moemesh")}

    result: dict[str, Any] = {"V": {}, "d": {}, "parts": {}, "sensitivity": {}}
    for v in THRESHOLDS:
        result["V"][v] = run(replace(base, threshold=v), title=f"V = {v}")
    for d in DISTANCES if args.predicted else ():
        far = replace(base, distance=d)
        result["d"][d] = run(far, work_of(args, arrivals, inputs, far, draw), title=f"d = {d}")
    for title, parts in variants():
        rows = rows_of(compare(work, inputs, replace(base, parts=parts), ("moemesh",), silent))
        show(title, {"moemesh": rows["moemesh"]})
        result["parts"][title] = rows["moemesh"]
    for name in COEFFICIENTS:
        for factor in FACTORS:
            scaled, kind = inputs.scaled(name, factor), Form.SUMS if name == "linear_row_s" else Form.DEVICES
            settings = replace(base, form=kind)
            again = work_of(args, arrivals, scaled, settings, draw)
            result["sensitivity"][f"{name} x {factor}"] = run(settings, again, scaled, f"{name} x {factor}")
    if args.plots:
        _plots(result, args.plots)
    return result


def variants() -> Iterator[tuple[str, Parts]]:
    yield "all parts", Parts()
    yield "no parts", NO_PARTS
    for part in vars(NO_PARTS):
        yield f"{part} alone", replace(NO_PARTS, **{part: True})
        yield f"all but {part}", replace(Parts(), **{part: False})


def _plots(result: dict[str, Any], folder: Path) -> None:
    for sweep in ("V", "d"):
        if result[sweep]:
            lines = {name: [row[name]["layer_ms"] for row in result[sweep].values()] for name in ("paper", "moemesh")}
            plot_sweep(list(result[sweep]), lines, (sweep, "time of a MoE layer [ms]"), folder / f"replay-{sweep}.png")


def bars(found: list[dict[str, Any]]) -> Iterator[Bar]:
    """The worst arrival trace of each profile and form."""
    for profile in PROFILES:
        for kind in FORMS:
            mine = [c["policies"] for c in found if c["profile"] == profile and c["form"] == kind]
            name = f"{profile}, {kind}: "
            yield Bar(name + "share of the gap closed", min(p["moemesh"]["closed"] for p in mine), 0.85)
            yield Bar(name + "resident cost / static", max(p["moemesh"]["resident_vs_static"] for p in mine), 0.9, True)
            same = "moemesh, paper's memory"
            ratios = [p[same]["layer_ms"] / p["paper"]["layer_ms"] for p in mine]
            yield Bar(name + "layer time / paper's at its memory", max(ratios), 0.95, True)


def main() -> None:
    args = parse()
    if not args.routing or not args.arrivals:
        print("no routing or no arrivals given: nothing is measured; see --help", flush=True)
        report("replay", {"measured": False})
        return
    found = [] if args.only == "sweeps" else list(cells(args))
    more = {} if args.only == "compare" else sweeps(args)
    report("replay", {"measured": True, "papers": PAPERS, "cells": found, **more}, bars(found) if found else ())


if __name__ == "__main__":
    main()
