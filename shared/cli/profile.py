"""``moemesh profile``: measures meshes on this machine and fits the coefficients of the performance model to them."""

import asyncio
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from itertools import product, starmap
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table

from shared.cli.progress import progress

if TYPE_CHECKING:
    from shared.planning.amax import Amax
    from shared.planning.fit import Point
    from shared.planning.sizes import Sizes

POOR = 0.3
"""Error of a time per token that says that something else has had the cores."""
MOST_NUMBERS = 12
"""Of either pool, batch or context: fits try all subsets of what may cost time."""


def profile(
    out: Annotated[Path, typer.Option(help="file to write; the routing that was seen goes beside it, as .trace")],
    model: Annotated[str, typer.Option(help="directory of a checkpoint, or a hub id; else the embedded model")] = "",
    attention: Annotated[str, typer.Option(help="numbers of attention instances")] = "1",
    experts: Annotated[str, typer.Option(help="numbers of expert instances")] = "1,2",
    batch: Annotated[str, typer.Option(help="numbers of sequences in a mesh")] = "1,2,4,8,16,32",
    context: Annotated[str, typer.Option(help="positions that tokens attend to")] = "64,384",
    pace: Annotated[str, typer.Option(help="device profile, by name or file, whose times instances keep")] = "",
) -> None:
    """Fit the time of a step on the live mesh, and say how well the fit predicts what it was made from."""
    from shared.cli.profiling import PACED, Effort, Shape, measure, with_a_max
    from shared.device_profile import load_profile
    from shared.errors import ConfigError
    from shared.models.source import open_source
    from shared.planning.fit import fit
    from shared.planning.fitted_file import save_fitted
    from shared.planning.here import predicted
    from shared.planning.sizes import sizes_of

    source, trace = open_source(model), out.with_suffix(".trace")
    paced = load_profile("--pace", pace).name if pace else ""
    for path in (out, trace):
        if path.exists():
            raise ConfigError("--out", f"{path} is there already")
    given = {"--attention": attention, "--experts": experts, "--batch": batch, "--context": context}
    lists = {name: numbers(name, text) for name, text in given.items()}
    shapes = [shape for shape in starmap(Shape, product(*lists.values())) if shape.batch >= shape.attention]
    check_enough(len(shapes), lists)
    effort = PACED if pace else Effort()
    with ExitStack() as undo:
        undo.callback(trace.unlink, missing_ok=True)  # it would be in the way of the next try
        with progress() as tell:
            measured = asyncio.run(measure(model, shapes, effort, source.spec.vocab_size, trace, pace, tell))
        undo.pop_all()
    sizes = sizes_of(source.spec, source.name)
    tables = tables_of(trace, sizes, measured)
    points = with_a_max(measured, tables)
    fitted = fit(points, sizes, paced)
    save_fitted(out, fitted, points, source.digest)
    show(points, predicted(fitted, tables, points))


def check_enough(shapes: int, lists: Mapping[str, Sequence[int]]) -> None:
    """Before hours are spent. Raises ConfigError."""
    from shared.errors import ConfigError
    from shared.planning.fit import LEAST_POINTS

    if shapes < LEAST_POINTS:
        few = f"only {shapes} measurements with a sequence for each attention instance: a fit takes {LEAST_POINTS}"
        raise ConfigError("--batch", f"{few}; give more numbers of sequences, contexts or instances")
    for name, given in lists.items():
        if len(given) > MOST_NUMBERS:
            raise ConfigError(name, f"{len(given)} numbers: at most {MOST_NUMBERS}")


def numbers(name: str, text: str) -> list[int]:
    """``"1,2"`` -> [1, 2]. Raises ConfigError."""
    from shared.errors import ConfigError

    found = [part.strip() for part in text.split(",") if part.strip()]
    if not found or not all(part.isdecimal() and int(part) for part in found):
        raise ConfigError(name, f"{text!r} is no list of positive whole numbers like 1,2")
    return [int(part) for part in found]


def tables_of(trace: Path, sizes: "Sizes", points: Sequence["Point"]) -> "Amax":
    """a_max for as many expert instances as were measured, from routing that was recorded meanwhile."""
    from shared.planning.assemble import experts_table
    from shared.planning.routing import recorded

    routing = recorded(trace, sizes.experts, sizes.top_k, max(point.batch for point in points))
    return experts_table(routing, sizes, sizes.experts, max(point.experts for point in points), lambda _: None)


def show(points: Sequence["Point"], predictions: Sequence[float]) -> None:
    """Measured and predicted, side by side, and how far they are apart."""
    table = Table("mesh", "batch", "context", "ms per token", "predicted", "error", "late", box=None)
    errors = [told / point.step_s - 1 for told, point in zip(predictions, points, strict=True)]
    for point, told, error in zip(points, predictions, errors, strict=True):
        cells = f"{point.attention}A{point.experts}E", str(point.batch), f"{point.context:g}"
        table.add_row(*cells, f"{point.step_s * 1e3:.1f}", f"{told * 1e3:.1f}", f"{error:+.0%}", f"{point.late:.0%}")
    console = Console()
    console.print(table)
    sizes = sorted(map(abs, errors))
    console.print(f"errors: median {sizes[len(sizes) // 2]:.1%}, worst {sizes[-1]:.1%}", highlight=False)
    if sizes[-1] > POOR:
        console.print("plans from this fit are as far off: measure again, with nothing else running", highlight=False)
