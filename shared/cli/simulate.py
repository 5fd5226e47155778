"""``moemesh simulate``: a day of requests on meshes of any size, beside other systems' rules. All of it is computed."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Column, Table

from shared.cli.progress import progress
from shared.errors import ConfigError, MoemeshError

if TYPE_CHECKING:
    from shared.simulation.run import Day, Simulated


def simulate(
    scenario: Annotated[Path, typer.Option(help="TOML file; bench/configs/paper.toml is one")],
    policy: Annotated[
        list[str] | None, typer.Option(help="janus, monolithic-tiers, balanced, coarse; may be repeated; else all")
    ] = None,
    hardware_file: Annotated[Path | None, typer.Option(help="TOML catalogue; else the built-in one")] = None,
    plot: Annotated[Path | None, typer.Option(help="PNG file to write")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="one JSON object instead of a table")] = False,
) -> None:
    """Simulate requests, decisions and scaling: device-hours, requests in time, tokens per second and device."""
    from shared.planning.rivals import NAMES

    unknown = sorted(set(policy or ()) - set(NAMES))
    if unknown:
        raise ConfigError("--policy", f"{unknown[0]!r} is none of {', '.join(NAMES)}")
    day, outcomes = _run(scenario, policy or list(NAMES), hardware_file)
    if plot:
        from shared.simulation.plot import plot_day

        plot_day(day, outcomes, plot)
    if as_json:
        facts = {"scenario": day.scenario.about, "peak": day.peak, "requests": len(day.requests.times)}
        print(json.dumps(facts | {"outcomes": [outcome.as_dict() for outcome in outcomes]}))
    else:
        _print(day, outcomes)


def _run(scenario: Path, policies: list[str], hardware_file: Path | None) -> "tuple[Day, list[Simulated]]":
    from shared.planning.hardware import FILE, load_hardware
    from shared.simulation.run import prepare, simulate
    from shared.simulation.scenario import load_scenario

    given, hardware = load_scenario(scenario), load_hardware(hardware_file or FILE)
    with progress() as show:
        try:
            day = prepare(given, hardware, show)
        except OSError as error:
            raise MoemeshError(f"{error.filename}: {error.strerror or error}") from error
        outcomes = []
        for number, policy in enumerate(policies):
            show("systems", number / len(policies))
            outcomes.append(simulate(day, policy))
    return day, outcomes


def _print(day: "Day", outcomes: "list[Simulated]") -> None:
    out = Console(highlight=False)
    out.print(f"{day.scenario.about}; simulated", soft_wrap=True)
    out.print(f"{len(day.requests.times)} requests, {day.peak:.1f} per second at the peak", soft_wrap=True)
    columns = ("device-h", "devices", "changes", "in time", "TPOT p99 ms", "TTFT p99 s", "tokens/s/device")
    table = Table(Column("system", no_wrap=True), *columns, box=None, header_style="bold")
    for row in outcomes:
        cells = [f"{row.gpu_hours:.0f}", f"{row.least} to {row.most}", f"{row.changes}", f"{row.attainment:.2%}"]
        cells += [f"{row.tpot_p99_s * 1e3:.1f}", f"{row.ttft_p99_s:.2f}", f"{row.goodput_device:.1f}"]
        table.add_row(row.system, *cells)
    out.print(table)
