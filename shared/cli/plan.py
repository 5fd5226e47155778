"""``moemesh plan``: how many instances of either pool keep a service level, on devices that need not be at hand."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Column, Table

from shared.cli.progress import progress
from shared.errors import MoemeshError

if TYPE_CHECKING:
    from shared.planning.session import Answer, Question
    from shared.planning.setting import Demand

TRACE_HELP = (
    "routing trace in which activated experts are counted; or a CSV of requests: their busiest time is planned for"
)

OPTIONS_APART = (
    (
        "--profile",
        "a profile is of the machine that it was made on",
        ("--hardware", "--attention-hardware", "--expert-hardware", "--link", "--per-node", "--hardware-file"),
    ),
    ("--profile", "activated experts are counted in the trace beside a profile, or in --trace", ("--zipf", "--bound")),
    ("--trace", "activated experts are counted in the trace", ("--zipf", "--bound")),
    ("--bound", "the bound takes no routing", ("--zipf",)),
)
"""An option, what it says, and those that would be ignored beside it."""


def plan(
    ctx: typer.Context,
    model: Annotated[Path, typer.Option(help="directory of a checkpoint, or a config.json alone")],
    slo_tpot_ms: Annotated[float, typer.Option(min=0.001, help="time per output token, mean")],
    rate: Annotated[float | None, typer.Option(min=1e-6, help="requests per second; not needed with a CSV")] = None,
    hardware: Annotated[str, typer.Option(help="device of both pools: h100, h200, a100, l40s")] = "",
    profile: Annotated[Path | None, typer.Option(help="file of `moemesh profile`: plan for that machine")] = None,
    attention_hardware: Annotated[str, typer.Option(help="device of the attention pool; else --hardware")] = "",
    expert_hardware: Annotated[str, typer.Option(help="device of the expert pool; else --hardware")] = "",
    link: Annotated[str, typer.Option(help="between nodes: infiniband, ethernet-25, ...")] = "infiniband",
    per_node: Annotated[int, typer.Option(min=1, help="devices of a node")] = 8,
    slo_ttft_ms: Annotated[float, typer.Option(min=0, help="time to the first token, mean; 0: any")] = 0.0,
    context: Annotated[float, typer.Option(min=1, help="tokens before one of the output, mean")] = 1024.0,
    output: Annotated[float, typer.Option(min=1, help="tokens of an output, mean")] = 256.0,
    prompt: Annotated[float, typer.Option(min=0, help="tokens of a prompt, mean; 0: context - output / 2")] = 0.0,
    chunk: Annotated[float, typer.Option(min=1, help="prompt tokens per step and attention instance")] = 512.0,
    trace: Annotated[Path | None, typer.Option(help=TRACE_HELP)] = None,
    zipf: Annotated[float, typer.Option(min=0, help="without a trace: exponent of experts' popularity")] = 0.6,
    bound: Annotated[bool, typer.Option("--bound", help="no routing: the bound for experts that are alike")] = False,
    tables: Annotated[Path | None, typer.Option(help="file of a_max tables: read if there, else written")] = None,
    attention_price: Annotated[float, typer.Option(min=1e-9, help="of an attention instance")] = 1.0,
    expert_price: Annotated[float, typer.Option(min=1e-9, help="of an expert instance")] = 1.0,
    most: Annotated[int, typer.Option(min=1, max=64, help="instances of a pool")] = 64,
    top: Annotated[int, typer.Option(min=1, help="plans to show")] = 5,
    hardware_file: Annotated[Path | None, typer.Option(help="TOML catalogue; else the built-in one")] = None,
    plot: Annotated[Path | None, typer.Option(help="PNG file to write")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="one JSON object instead of text")] = False,
) -> None:
    """Find the fewest (or cheapest) devices that keep a time per token, and say why. All times are computed."""
    given_names, recorded = given_options(ctx), trace is not None and trace.suffix.lower() == ".csv"
    check_together(given_names - {"--trace"} if recorded else given_names)
    from shared.planning.assemble import Names
    from shared.planning.hardware import FILE
    from shared.planning.session import Question, refusal
    from shared.planning.setting import Slo

    names = Names(
        attention_hardware or hardware, expert_hardware or hardware, link, per_node,
        attention_price=attention_price, expert_price=expert_price,
    )  # fmt: skip
    requests, trace = (trace, None) if recorded else (None, trace)
    demand = _demand(requests, given_names, rate, context, output, prompt, chunk)
    slo = Slo(slo_tpot_ms / 1e3, slo_ttft_ms / 1e3 if slo_ttft_ms else float("inf"))
    routing = None if bound else zipf
    question = Question(model, names, demand, slo, trace, routing, tables, hardware_file or FILE, most, profile)
    given = _ask(question, top)
    if plot:
        _plot(question, given, plot)
    if as_json:
        print(json.dumps(_facts(question, given)))
    if given.found.best is None:
        raise refusal(question, given)
    if not as_json:
        _print(question, given)


def _demand(
    requests: Path | None,
    given: set[str],
    rate: float | None,
    context: float,
    output: float,
    prompt: float,
    chunk: float,
) -> "Demand":
    """What the command line says, and where it says nothing, the CSV of requests. Raises ConfigError, BadArrivals."""
    from shared.errors import ConfigError
    from shared.planning.demand import recorded_demand
    from shared.planning.setting import Demand

    if requests is None:
        if rate is None:
            raise ConfigError("--rate", "say how many requests come per second, or give a CSV of them as --trace")
        return Demand(rate, prompt or max(1.0, context - output / 2), output, chunk)
    with _named_errors():
        seen = recorded_demand(requests, chunk)
    output = output if "--output" in given else seen.output
    if "--context" in given and not prompt:
        prompt = max(1.0, context - output / 2)
    return Demand(rate or seen.rate, prompt or seen.prompt, output, chunk)


@contextmanager
def _named_errors() -> Iterator[None]:
    """What goes wrong with a file is said in a line."""
    try:
        yield
    except OSError as error:
        raise MoemeshError(f"{error.filename}: {error.strerror or error}") from error


def given_options(ctx: typer.Context) -> set[str]:
    """Those that stand on the command line, whatever their values."""
    sources = {name: ctx.get_parameter_source(name) for name in ctx.params}
    given = (name for name, source in sources.items() if source and source.name == "COMMANDLINE")
    return {f"--{name.replace('_', '-')}" for name in given}


def check_together(given: set[str]) -> None:
    """Raises ConfigError for options of which one would be ignored, and for neither devices nor a profile."""
    from shared.errors import ConfigError

    for option, says, others in OPTIONS_APART:
        if option in given and (ignored := [other for other in others if other in given]):
            raise ConfigError(option, f"{says}: leave out {' and '.join(ignored)}")
    if not given & {"--profile", "--hardware"} and not given >= {"--attention-hardware", "--expert-hardware"}:
        raise ConfigError("--hardware", "name a device, as in --hardware h100, or give a --profile of this machine")


def _ask(question: "Question", top: int) -> "Answer":
    from shared.planning.session import answer

    with progress() as show, _named_errors():
        return answer(question, show, top)


def _facts(question: "Question", given: "Answer") -> dict[str, Any]:
    """The question, the tables and all plans, for JSON: what is infinite is null."""
    from shared.planning.report import binding

    found, setting, slo = given.found, given.setting, question.slo
    plans = {"best": found.best, "mesh": found.mesh, "monolith": found.monolith, "binding": found.binding}
    return {
        "model": setting.sizes.name,
        "hardware": vars(question.names) if question.profile is None else str(question.profile),
        "demand": vars(question.demand),
        "slo_tpot_s": slo.tpot_s,
        "slo_ttft_s": None if slo.ttft_s == float("inf") else slo.ttft_s,
        "tables": {"about": setting.tables.about, "slots": setting.room.slots, "policy": setting.tables.policy},
        "looked_at": found.looked_at,
        "space": found.space,
        "distance_from_exact": given.exact,
        "why": binding(found),
        **{name: plan and _finite(plan.as_dict()) for name, plan in plans.items()},
        "ranking": [_finite(plan.as_dict()) for plan in found.ranking],
    }


def _finite(values: Any) -> Any:
    if isinstance(values, dict):
        return {key: _finite(value) for key, value in values.items()}
    return None if isinstance(values, float) and values in (float("inf"), float("-inf")) else values


def _print(question: "Question", given: "Answer") -> None:
    from shared.planning.report import binding, chosen

    found, setting, out = given.found, given.setting, Console(highlight=False)
    best = found.best
    assert best is not None
    fitted = f"times by {question.profile}, where prompts cost what rows of decode do"
    source = fitted if question.profile else "all times are computed"
    out.print(f"{setting.sizes.name}; a_max by {setting.tables.about}; {source}", soft_wrap=True)
    for line in chosen(best, setting):
        out.print(line, soft_wrap=True)
    out.print(f"why not less: {binding(found)}", soft_wrap=True)
    table = Table(
        Column("plan", no_wrap=True),
        *("devices", "price", "batch", "ms/token", "first ms", "tokens/s/device", "a_max"),
        box=None,
    )
    for row in found.ranking:
        cells = [f"{row.devices}", f"{row.price:g}", f"{row.batch:.0f}", f"{row.tpot_s * 1e3:.1f}"]
        cells += [f"{row.ttft_s * 1e3:.0f}", f"{row.tokens_per_s_device:.1f}", f"{row.a_max:.1f}"]
        table.add_row(row.name, *cells)
    out.print(table)
    other = found.mesh if best.kind == "monolith" else found.monolith
    kind = "mesh" if best.kind == "monolith" else "monolith"
    if not question.profile:  # of monoliths there are no measurements
        out.print(f"the best {kind}: {other.name}, price {other.price:g}" if other else f"no {kind} keeps the limits")
    out.print(
        f"{found.looked_at} of {found.space} candidates looked at; {given.exact:.1%} from the optimum of all of them"
    )


def _plot(question: "Question", given: "Answer", file: Path) -> None:
    from shared.planning.plot import plot_plans
    from shared.planning.search import look_at

    outlook = look_at(given.setting, given.space, question.demand, question.slo)
    title = f"{given.setting.sizes.name}, {question.demand.rate:g} requests/s"
    plot_plans(given.space, outlook, given.found, question.slo, title, file)
