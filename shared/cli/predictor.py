"""``moemesh predictor``: train load predictors on text, judge them on other text, write what they foresee as traces."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table

from shared.errors import ConfigError, MoemeshError

if TYPE_CHECKING:
    from shared.models.loader import Checkpoint
    from shared.predictors.recording import Passage
    from shared.predictors.report import Report

Model = Annotated[str, typer.Option(help="directory or hub id; empty: the embedded demo model")]
Texts = Annotated[list[Path], typer.Option(help="file of text; may be given several times")]
Predictors = Annotated[Path | None, typer.Option(help="directory; default: predictors/ in that of the model")]
Context = Annotated[int, typer.Option(min=64, help="tokens that are read together")]
Threads = Annotated[int, typer.Option(min=0, help="0: all")]


def train(
    text: Texts,
    out: Annotated[Path, typer.Option(help="directory to write")],
    model: Model = "",
    without: Annotated[
        list[Path] | None, typer.Option(help="text that what is trained on must not overlap with; several times")
    ] = None,
    distances: Annotated[str, typer.Option(help="layers ahead: 1-5, or 1,3")] = "1-5",
    rows: Annotated[int, typer.Option(min=2048, help="read about so many tokens, spread over the texts")] = 200_000,
    threshold: Annotated[float, typer.Option(help="recall of a plain copy below which a gate is fine-tuned")] = 0.9,
    width: Annotated[int, typer.Option(min=0, help="hidden units beside the gate; 0: none")] = 64,
    epochs: Annotated[int, typer.Option(min=1)] = 6,
    seed: int = 0,
    context: Context = 512,
    threads: Threads = 0,
) -> None:
    """Train predictors of a model's expert loads on text; seven tenths train, three tenths judge."""
    _use_threads(threads)
    from shared.models.loader import open_checkpoint
    from shared.predictors.trainer import Job, train_predictors
    from shared.predictors.training import Training

    training = Training(threshold, width, epochs, seed=seed)
    job = Job(text, parse_distances(distances), without or (), rows, context, threads, training)
    with Console(stderr=True, highlight=False).status("opening the model") as status:
        report = train_predictors(open_checkpoint(model), job, out, status.update)
    print(f"wrote {out}: {report.nbytes} bytes in memory; on the three tenths that were not trained on:")
    print_report(report, Console(highlight=False))


def evaluate(
    text: Texts, model: Model = "", predictor: Predictors = None, context: Context = 512, threads: Threads = 0
) -> None:
    """Judge predictors and every baseline on text."""
    _use_threads(threads)
    from shared.models.loader import open_checkpoint
    from shared.predictors.report import evaluate

    checkpoint = open_checkpoint(model)
    passages = _read(checkpoint, text, context, threads)
    print_report(evaluate(checkpoint, predictor or _own(checkpoint), passages, text), Console(highlight=False))


def apply(
    text: Texts,
    out: Annotated[Path, typer.Option(help="directory to write; must have no traces yet")],
    model: Model = "",
    predictor: Predictors = None,
    batch: Annotated[int, typer.Option(min=1, help="rows of a step")] = 64,
    context: Context = 512,
    threads: Threads = 0,
) -> None:
    """Write the routing of text and what predictors foresee of it, as traces with the same steps."""
    _use_threads(threads)
    from shared.models.loader import open_checkpoint
    from shared.predictors.files import load_predictors
    from shared.predictors.recording import batches
    from shared.predictors.traces import write_traces
    from shared.traces.native import Header

    checkpoint = open_checkpoint(model)
    _, tuned = load_predictors(predictor or _own(checkpoint), checkpoint.digest)
    spec = checkpoint.spec
    header = Header(checkpoint.name, checkpoint.digest, spec.router.experts, tuple(spec.moe_layers))
    steps = batches(_read(checkpoint, text, context, threads), batch, whole=False)
    try:
        print(f"wrote {write_traces(out, header, tuned, steps)} steps to {out}")
    except FileExistsError as error:
        raise MoemeshError(f"{error.filename}: exists already") from error


def parse_distances(text: str) -> list[int]:
    """``1-3`` or ``1,3``. Raises ConfigError."""
    try:
        first, *last = map(int, text.split("-"))
        found = list(range(first, last[0] + 1)) if last else [first]
    except ValueError:
        parts = text.split(",")
        found = [int(part) if part.strip().isdigit() else 0 for part in parts]
    if not found or min(found) < 1:
        raise ConfigError("--distances", f"{text!r} is neither a range such as 1-5 nor a list such as 1,3")
    return sorted(set(found))


def print_report(report: "Report", out: Console) -> None:
    """A line for each distance and layer: recall, correlation and error of every predictor."""
    table = Table("distance", "layer", *report.quality, box=None, header_style="bold")
    for layer, distance in sorted(report.quality["tuned"], key=lambda pair: pair[::-1]):
        qualities = (pairs[layer, distance] for pairs in report.quality.values())
        cells = (f"{q.recall:.3f} {q.correlation:6.3f} {q.error:.3f}" for q in qualities)
        table.add_row(str(distance), str(layer), *cells)
    out.print("recall, load correlation, load error:")
    out.print(table)


def _use_threads(threads: int) -> None:
    """To be called before numba and torch are imported."""
    from shared.kernels.threads import thread_environment

    os.environ.update(thread_environment(threads or len(os.sched_getaffinity(0)), os.environ))


def _own(checkpoint: "Checkpoint") -> Path:
    return checkpoint.path / "predictors"


def _read(checkpoint: "Checkpoint", texts: list[Path], context: int, threads: int) -> Iterator["Passage"]:
    from tokenizers import Tokenizer

    from shared.predictors.recording import Reader, passages_of

    tokens = passages_of(texts, Tokenizer.from_file(str(checkpoint.source.tokenizer_file)), context)
    reader = Reader(checkpoint, context, threads)
    with Console(stderr=True, highlight=False).status("reading") as status:
        for number, passage in enumerate(tokens):
            yield reader.read(passage)
            status.update(f"reading: {(number + 1) * context} of {len(tokens) * context} rows")


def predictor_app() -> typer.Typer:
    """The ``predictor`` sub-command."""
    app = typer.Typer(no_args_is_help=True, help="Load predictors: train, judge, write what they foresee.")
    for command in (train, evaluate, apply):
        app.command()(command)
    return app
