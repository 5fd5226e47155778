"""``moemesh trace``: record which experts a live mesh chooses, and say what is in a routing trace."""

import asyncio
import signal
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.status import Status
from rich.table import Table

from shared.cli.mesh import local_nats
from shared.cli.status import DEFAULT_NATS
from shared.errors import MoemeshError

if TYPE_CHECKING:
    from shared.traces.recorder import Recorder
    from shared.traces.summary import Summary


def record(
    out: Annotated[Path, typer.Option(help="file to write; must not exist yet")],
    seconds: Annotated[float, typer.Option(min=0, help="stop after so long; 0: do not")] = 0.0,
    rows: Annotated[int, typer.Option(min=0, help="stop after so many tokens in every layer; 0: do not")] = 0,
    nats: Annotated[
        str, typer.Option(envvar="MOEMESH_NATS", help="URL of the NATS server; else that of `moemesh up`, or port 4222")
    ] = "",
    mesh: Annotated[str, typer.Option(envvar="MOEMESH_MESH", help="name of the mesh")] = "default",
) -> None:
    """Write which experts every row of a live mesh chooses, until the limit or Ctrl-C."""
    errors = Console(stderr=True, highlight=False)
    url = nats or local_nats(mesh) or DEFAULT_NATS
    with errors.status("looking for attention instances") as status:
        recorder = asyncio.run(_record(url, mesh, out, seconds, rows, status))
    print(f"wrote {out}: {describe(recorder)}")
    if recorder.lost:
        errors.print(f"moemesh: {recorder.lost} exchanges are missing: they came faster than they could be sent")
    if recorder.pauses:
        errors.print(f"moemesh: {recorder.pauses} pauses without recording, while NATS was away")


async def _record(url: str, mesh: str, out: Path, seconds: float, rows: int, status: Status) -> "Recorder":
    from shared.traces.recorder import Limits, record

    stop, loop = asyncio.Event(), asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, stop.set)

    def show(recorder: "Recorder") -> None:
        status.update(f"recording: {describe(recorder)}" + (f", {recorder.lost} missing" if recorder.lost else ""))

    return await record(url, mesh, out, stop, Limits(seconds, rows), show)


def describe(recorder: "Recorder") -> str:
    """What has been recorded, for a person."""
    return (
        f"{recorder.rows} rows x {len(recorder.header.layers)} layers in {recorder.exchanges} exchanges "
        f"from {len(recorder.sources)} attention instance{'' if len(recorder.sources) == 1 else 's'}"
    )


def show(file: Annotated[Path, typer.Argument(help="a trace of moemesh, Megatron-core or vLLM")]) -> None:
    """Say what a routing trace holds, or where it is damaged."""
    from shared.traces.summary import summarize

    try:
        summary = summarize(file)
    except OSError as error:
        raise MoemeshError(f"{file}: {error.strerror or error}") from error
    print_summary(summary, Console(highlight=False))
    if summary.warning:
        Console(stderr=True, highlight=False).print(f"moemesh: {summary.warning}", soft_wrap=True)


def print_summary(summary: "Summary", out: Console) -> None:
    """A line about the file and one for each layer."""
    name = f" of {summary.model}" if summary.model else ""
    out.print(
        f"{summary.kind} trace{name}: {len(summary.layers)} layers, {summary.experts} experts, top-{summary.top_k}, "
        f"{len(summary.steps)} steps, {summary.exchanges} exchanges",
        soft_wrap=True,
    )
    titles = ("layer", "rows", "exchanges", "activated: mean", "least", "most", "most frequent row")
    table = Table(*titles, box=None, header_style="bold")
    for number, layer in sorted(summary.layers.items()):
        counts = layer.activated or [0]
        mean, share = f"{sum(counts) / len(counts):.1f}", f"{layer.top_share:.1%}"
        cells = (number, layer.rows.total(), len(layer.activated), mean, min(counts), max(counts), share)
        table.add_row(*map(str, cells))
    out.print(table)


def trace_app() -> typer.Typer:
    """The ``trace`` sub-command."""
    app = typer.Typer(no_args_is_help=True, help="Routing traces: record one from a live mesh, look at one.")
    app.command()(record)
    app.command()(show)
    return app
