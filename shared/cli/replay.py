"""``moemesh replay``: what elastic experts would do with recorded routing and arrivals, beside other policies."""

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.progress import Progress, TaskID
from rich.table import Table

from shared.errors import ConfigError, MoemeshError

if TYPE_CHECKING:
    from shared.replay.base import Parts, Settings
    from shared.replay.inputs import Inputs
    from shared.replay.run import Outcome
    from shared.replay.session import Draw, Files
    from shared.replay.work import Work

PARTS = ("predictor", "scaler", "placer", "keep-alive")
BATCHING = ("engine", "second")


def replay(
    routing: Annotated[
        list[Path], typer.Option(help="routing trace of one domain; requests are drawn from all evenly")
    ],
    arrivals: Annotated[Path, typer.Option(help="CSV of requests: timestamp, context and generated tokens")],
    policy: Annotated[list[str], typer.Option(help="static, eplb, oracle, paper or moemesh; may be repeated")],
    predicted: Annotated[
        list[Path] | None,
        typer.Option(help="predicted routing of each domain, in order; else the latest loads are expected"),
    ] = None,
    profile: Annotated[str, typer.Option(help="inputs to compute with: local, paper")] = "local",
    inputs: Annotated[Path | None, typer.Option(help="TOML file of profiles; else the built-in one")] = None,
    form: Annotated[str, typer.Option(help="of layer times: devices, sums, paper")] = "devices",
    batching: Annotated[str, typer.Option(help="engine, or second: all requests of a second are one batch")] = "engine",
    seconds: Annotated[float, typer.Option(min=0, help="of the arrivals; 0: all")] = 0.0,
    distance: Annotated[int, typer.Option(min=1, help="layers from what is known to what is predicted")] = 1,
    cv: Annotated[float, typer.Option(min=0, help="coefficient of variation of loads that is even enough")] = 0.2,
    prefill_cv: Annotated[float | None, typer.Option(min=0, help="of steps that compute prompts; else --cv")] = None,
    budget: Annotated[
        float, typer.Option(min=0, help="memory of `moemesh`, in sizes of all experts once each; 0: its default")
    ] = 0.0,
    without: Annotated[
        list[str] | None, typer.Option(help="switch a part of `moemesh` off: predictor, scaler, placer, keep-alive")
    ] = None,
    seed: Annotated[int, typer.Option(help="for drawing requests")] = 0,
    plot: Annotated[Path | None, typer.Option(help="PNG file to write")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="one JSON object instead of a table")] = False,
) -> None:
    """Simulate policies on recorded routing and arrivals: time of a MoE layer, and what experts cost in memory."""
    from shared.replay.base import Settings
    from shared.replay.inputs import FILE, load_inputs
    from shared.replay.policies import check_policies
    from shared.replay.session import Draw, Files
    from shared.replay.timing import Form

    check_policies(policy)
    kind = Form(_one_of("--form", form, [*Form]))
    settings = Settings(distance=distance, threshold=cv, form=kind, parts=_parts(without or []))
    settings = replace(settings, prefill_threshold=prefill_cv, budget=budget or settings.budget)
    draw = Draw(seconds, _one_of("--batching", batching, BATCHING) == "second", seed)
    given, files = load_inputs(profile, inputs or FILE), Files(tuple(routing), tuple(predicted or []), arrivals)
    facts = {"profile": profile, "form": form, "batching": batching, "distance": distance, "cv": cv, "seed": seed}
    facts |= {"prefill_cv": prefill_cv, "budget": settings.budget, "predicted": bool(predicted)}
    work, outcomes = _run(files, given, settings, draw, policy)
    _show(facts | {"steps": len(work.rows), "rows": int(work.rows.sum())}, given, outcomes, plot, as_json)


def _show(
    facts: Mapping[str, object], inputs: "Inputs", outcomes: "dict[str, Outcome]", plot: Path | None, as_json: bool
) -> None:
    if as_json:
        print(json.dumps({**facts, "inputs": vars(inputs), "outcomes": _rows(outcomes)}))
    else:
        _print(facts, inputs.about, outcomes)
    if plot:
        from shared.replay.plot import plot_outcomes

        plot_outcomes(list(outcomes.values()), f"{facts['profile']}, {facts['form']}", plot)


def _run(
    files: "Files", inputs: "Inputs", settings: "Settings", draw: "Draw", policies: list[str]
) -> "tuple[Work, dict[str, Outcome]]":
    """Everything that takes time, with a bar for each part of it on stderr."""
    from shared.replay.session import compare, form

    with Progress(console=Console(stderr=True), transient=True) as bar:
        tasks: dict[str, TaskID] = {}

        def show(what: str, share: float) -> None:
            if what not in tasks:
                tasks[what] = bar.add_task(what, total=1.0)
            bar.update(tasks[what], completed=share)

        try:
            work = form(files, inputs, settings, draw, show)
        except OSError as error:
            raise MoemeshError(f"{error.filename}: {error.strerror or error}") from error
        return work, compare(work, inputs, settings, policies, show)


def _rows(outcomes: "dict[str, Outcome]") -> list[dict[str, float | str]]:
    from shared.replay.session import against

    return [outcome.as_dict() | against(outcome, outcomes) for outcome in outcomes.values()]


def _one_of(setting: str, given: str, known: "list[str] | tuple[str, ...]") -> str:
    if given not in known:
        raise ConfigError(setting, f"{given!r} is none of {', '.join(known)}")
    return given


def _parts(without: list[str]) -> "Parts":
    from shared.replay.base import Parts

    return Parts(**{_one_of("--without", part, PARTS).replace("-", "_"): False for part in without})


def _print(facts: Mapping[str, object], about: str, outcomes: "dict[str, Outcome]") -> None:
    out = Console(highlight=False)
    title = f"{facts['steps']} steps, {facts['rows']} rows; {facts['profile']}: {about}"
    out.print(f"{title}; layer times in the form {facts['form']}", soft_wrap=True)
    columns = ("layer ms", "p99", "gap closed", "waited s", "residents", "proxy", "resident", "provisioned")
    table = Table("policy", *columns, box=None, header_style="bold")
    for row in _rows(outcomes):
        cells = [f"{row['layer_ms']:.3f}", f"{row['layer_ms_p99']:.3f}", f"{row['closed']:.1%}"]
        cells += [f"{row['waited_s']:.1f}", f"{row['residents']:.0f}"]
        cells += [f"{row[name + '_gb_s']:,.0f}" for name in ("proxy", "resident", "provisioned")]
        table.add_row(str(row["policy"]), *cells)
    out.print(table)
    out.print("Costs in GB-seconds: the paper's proxy, all residents over time, all instances' memory.", soft_wrap=True)
