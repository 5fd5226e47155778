"""What do elastic experts bring on recorded routing and arrivals, beside static expert parallelism, EPLB and MoEless?

    python bench/replay.py --routing A.trace B.trace --predicted 'A-d{d}.trace' 'B-d{d}.trace' --arrivals X.csv Y.csv

One routing trace for each domain (`moemesh trace record`, `moemesh predictor apply`), predicted ones by distance,
arrivals as in the Azure LLM inference traces. Compares all policies in both profiles of shared/replay/inputs.toml and
in all forms of layer times, then sweeps V and d, leaves parts of `moemesh` out, and scales coefficients, on the first
arrival trace. Without data it says so and measures nothing. The last line is one JSON object.
"""

import argparse
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from common import Bar, report

from shared.replay.base import Parts, Settings
from shared.replay.inputs import COEFFICIENTS, Inputs, load_inputs
from shared.replay.plot import plot_outcomes, plot_sweeps
from shared.replay.run import Outcome
from shared.replay.session import Draw, Files, against, compare, form
from shared.replay.timing import Form
from shared.replay.work import Work

FORMS = (Form.DEVICES, Form.SUMS)
"""Those that have bars."""
PROFILES = ("local", "paper")
THRESHOLDS, DISTANCES, FACTORS = (0.2, 0.4, 0.6, 0.8, 1.0), (1, 2, 3, 4, 5), (0.5, 2.0)
NO_PARTS = Parts(predictor=False, scaler=False, placer=False, keep_alive=False)
SAME = "moemesh, paper's memory"
PAPERS = {
    "layer vs static": 0.568,
    "layer vs EPLB": 0.781,
    "proxy vs static": 0.073,
    "vs EPLB": 0.049,
    "vs Oracle": 0.159,
}
"""What MoEless reports, as ratios."""
Rows = dict[str, dict[str, Any]]
"""Policy -> its numbers."""


def parse() -> argparse.Namespace:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--routing", type=Path, nargs="+", default=[], help="one trace for each domain")
    p.add_argument("--predicted", nargs="+", default=[], help="predicted ones in the same order; {d} is the distance")
    p.add_argument("--arrivals", type=Path, nargs="+", default=[], help="CSV files of requests")
    p.add_argument("--seconds", type=float, default=0.0, help="of the arrivals; 0: all")
    p.add_argument("--sweep-seconds", type=float, default=600.0, help="of the arrivals, in sweeps and ablations")
    p.add_argument("--profile", choices=PROFILES, nargs="+", default=PROFILES)
    p.add_argument("--plots", type=Path, help="directory for PNG files")
    p.add_argument("--only", choices=("compare", "sweeps"), help="a part of the bench")
    return p.parse_args()


@dataclass(frozen=True)
class Bench:
    """The traces, and what is run with them."""

    args: argparse.Namespace

    def work(self, arrivals: Path, inputs: Inputs, settings: Settings, seconds: float) -> Work:
        predicted = tuple(Path(name.format(d=settings.distance)) for name in self.args.predicted)
        files = Files(tuple(self.args.routing), predicted, arrivals)
        return form(files, inputs, settings, Draw(seconds), silent)

    def cells(self) -> Iterator[dict[str, Any]]:
        """Every profile, arrival trace and form."""
        for profile in self.args.profile:
            for arrivals in self.args.arrivals:
                for kind in Form:
                    policies = self._cell(profile, arrivals, kind)
                    yield {"profile": profile, "arrivals": arrivals.stem, "form": str(kind), "policies": policies}

    def _cell(self, profile: str, arrivals: Path, kind: Form) -> Rows:
        """All policies, and `moemesh` with the memory that `paper` has used."""
        inputs, settings = load_inputs(profile), Settings(form=kind)
        work = self.work(arrivals, inputs, settings, self.args.seconds)
        outcomes = compare(work, inputs, settings, ("eplb", "paper", "moemesh"), silent)
        rows, budget = rows_of(outcomes), outcomes["paper"].residents / (work.layers(inputs) * work.experts)
        same = replace(settings, budget=budget, extra=max(settings.extra, budget - 1))
        rows[SAME] = rows_of(compare(work, inputs, same, ("moemesh",), silent))["moemesh"]
        show(f"{profile} {arrivals.stem[-4:]} {kind}", rows)
        if self.args.plots and kind is Form.DEVICES:
            title = f"{profile}-{arrivals.stem[-4:]}"
            plot_outcomes(list(outcomes.values()), title, self.args.plots / f"replay-{title}.png")
        return rows

    def sweeps(self, profile: str) -> dict[str, Any]:
        """V and d as in the paper, parts on alone and off alone, coefficients halved and doubled."""
        inputs, base = load_inputs(profile), Settings()
        work = self.work(self.args.arrivals[0], inputs, base, self.args.sweep_seconds)
        result = {
            "V": {v: self.run(f"{profile} V = {v}", work, inputs, replace(base, threshold=v)) for v in THRESHOLDS},
            "d": {d: self._again(f"{profile} d = {d}", inputs, replace(base, distance=d)) for d in self._distances},
            "parts": {
                title: self.run(f"{profile} {title}", work, inputs, replace(base, parts=parts))["moemesh"]
                for title, parts in variants()
            },
            "sensitivity": dict(self._sensitivity(profile, inputs, base)),
        }
        if self.args.plots:
            lines = {
                sweep: {value: {p: row[p]["layer_ms"] for p in row} for value, row in result[sweep].items()}
                for sweep in ("V", "d")
                if result[sweep]
            }
            plot_sweeps(lines, "time of a MoE layer [ms]", self.args.plots / f"replay-sweeps-{profile}.png")
        return result

    @property
    def _distances(self) -> tuple[int, ...]:
        return DISTANCES if self.args.predicted else ()

    def _sensitivity(self, profile: str, inputs: Inputs, base: Settings) -> Iterator[tuple[str, Rows]]:
        for name in COEFFICIENTS:
            kind = Form.SUMS if name == "linear_row_s" else Form.DEVICES
            for factor in FACTORS:
                title = f"{name} x {factor}"
                rows = self._again(f"{profile} {title}", inputs.scaled(name, factor), replace(base, form=kind))
                yield title, rows

    def _again(self, title: str, inputs: Inputs, settings: Settings) -> Rows:
        work = self.work(self.args.arrivals[0], inputs, settings, self.args.sweep_seconds)
        return self.run(title, work, inputs, settings)

    def run(self, title: str, work: Work, inputs: Inputs, settings: Settings) -> Rows:
        rows = rows_of(compare(work, inputs, settings, ("paper", "moemesh"), silent))
        rows = {name: rows[name] for name in ("paper", "moemesh")}
        show(title, rows)
        return rows


def silent(_what: str, _share: float) -> None:
    """Benches print lines."""


def rows_of(outcomes: dict[str, Outcome]) -> Rows:
    return {name: outcome.as_dict() | against(outcome, outcomes) for name, outcome in outcomes.items()}


def show(title: str, rows: Rows) -> None:
    for name, row in rows.items():
        print(
            f"{title:>28} {name:>22}  {row['layer_ms']:8.4f} ms  p99 {row['layer_ms_p99']:8.4f}  "
            f"closed {row['closed']:7.1%}  waited {row['waited_s']:7.1f} s  late {row['late_share']:.4f}  "
            f"residents {row['residents']:7.1f}  proxy {row['proxy_vs_static']:.3f}  "
            f"resident {row['resident_vs_static']:.3f} of static",
            flush=True,
        )


def variants() -> Iterator[tuple[str, Parts]]:
    yield "all parts", Parts()
    yield "no parts", NO_PARTS
    for part in vars(NO_PARTS):
        yield f"{part} alone", replace(NO_PARTS, **{part: True})
        yield f"all but {part}", replace(Parts(), **{part: False})


def bars(found: list[dict[str, Any]]) -> Iterator[Bar]:
    """The worst arrival trace of each profile and form."""
    for profile, kind in sorted({(cell["profile"], cell["form"]) for cell in found if cell["form"] in FORMS}):
        mine = [c["policies"] for c in found if (c["profile"], c["form"]) == (profile, kind)]
        name = f"{profile}, {kind}: "
        yield Bar(name + "share of the gap closed", min(p["moemesh"]["closed"] for p in mine), 0.85)
        yield Bar(name + "resident cost / static", max(p["moemesh"]["resident_vs_static"] for p in mine), 0.9, True)
        ratios = [p[SAME]["layer_ms"] / p["paper"]["layer_ms"] for p in mine]
        yield Bar(name + "layer time / paper's at its memory", max(ratios), 0.95, True)


def main() -> None:
    args = parse()
    if not args.routing or not args.arrivals:
        print("no routing or no arrivals given: nothing is measured; see --help", flush=True)
        report("replay", {"measured": False})
        return
    bench = Bench(args)
    found = [] if args.only == "sweeps" else list(bench.cells())
    more = {} if args.only == "compare" else {profile: bench.sweeps(profile) for profile in args.profile}
    report("replay", {"measured": True, "papers": PAPERS, "cells": found, "sweeps": more}, bars(found))


if __name__ == "__main__":
    main()
