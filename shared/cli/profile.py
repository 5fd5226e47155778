"""``moemesh profile``: measures meshes on this machine and fits the coefficients of the performance model to them."""

import asyncio
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table

if TYPE_CHECKING:
    from shared.planning.fit import Point
    from shared.planning.routing import Routing


def profile(
    model: Annotated[str, typer.Option(help="directory of a checkpoint, or a hub id")],
    out: Annotated[Path, typer.Option(help="file to write; the routing that was seen goes beside it, as .trace")],
    experts: Annotated[str, typer.Option(help="numbers of expert instances")] = "1,2",
    batch: Annotated[str, typer.Option(help="numbers of sequences")] = "1,2,4,8,16,32",
    context: Annotated[str, typer.Option(help="positions that tokens attend to")] = "64,512",
) -> None:
    """Fit the time of a step on the live mesh, and say how well the fit predicts what it was made from."""
    from shared.cli.profiling import Shape, measure
    from shared.errors import ConfigError
    from shared.models.source import open_source
    from shared.planning.fit import errors, fit
    from shared.planning.fitted_file import save_fitted
    from shared.planning.routing import recorded

    source, trace = open_source(model), out.with_suffix(".trace")
    for path in (out, trace):
        if path.exists():
            raise ConfigError("--out", f"{path} is there already")
    sizes = [numbers("--experts", experts), numbers("--batch", batch), numbers("--context", context)]
    shapes = [Shape(e, b, c) for e in sizes[0] for b in sizes[1] for c in sizes[2]]
    points = asyncio.run(measure(model, shapes, {}, source.spec.vocab_size, trace))
    spec = source.spec
    fitted = fit(points, len(spec.layers), len(spec.moe_layers), spec.router.top_k)
    save_fitted(out, fitted, points, source.name, source.digest)
    tables = a_max(recorded(trace, spec.router.experts, spec.router.top_k), points)
    show(points, errors(fitted, points, tables))


def numbers(name: str, text: str) -> list[int]:
    """``"1,2"`` -> [1, 2]. Raises ConfigError."""
    from shared.errors import ConfigError

    found = [part.strip() for part in text.split(",") if part.strip()]
    if not found or not all(part.isdecimal() and int(part) for part in found):
        raise ConfigError(name, f"{text!r} is no list of positive whole numbers like 1,2")
    return [int(part) for part in found]


def a_max(routing: "Routing", points: Sequence["Point"]) -> list[float]:
    """Activated experts on the busiest instance for every point, mean over layers, from routing."""
    import numpy as np

    from shared.planning.amax import monte_carlo

    tables = monte_carlo(routing, routing.experts, max(point.experts for point in points))
    instances, rows = (np.array([getattr(p, name) for p in points], float) for name in ("experts", "batch"))
    return tables.look(instances, rows).mean(axis=0).tolist()


def show(points: Sequence["Point"], off: Sequence[float]) -> None:
    """Measured and predicted, side by side, and how far they are apart."""
    table = Table("mesh", "batch", "context", "ms per token", "predicted", "error", box=None)
    for point, error in zip(points, off, strict=True):
        measured = point.step_s * 1e3
        cells = f"1A{point.experts}E", str(point.batch), f"{point.context:g}", f"{measured:.1f}"
        table.add_row(*cells, f"{measured * (1 + error):.1f}", f"{error:+.0%}")
    console = Console()
    console.print(table)
    sizes = sorted(map(abs, off))
    console.print(f"errors: median {sizes[len(sizes) // 2]:.1%}, worst {sizes[-1]:.1%}", highlight=False)
