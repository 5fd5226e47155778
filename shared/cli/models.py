"""``moemesh models``: make checkpoints for benches and tests, and say what a checkpoint is."""

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console


def make(
    preset: Annotated[str, typer.Option(help="bench-1b, tiny-qwen3 or tiny-mixtral")],
    out: Annotated[Path, typer.Option(help="directory to write")],
    seed: Annotated[int, typer.Option(help="seed of the random weights")] = 0,
) -> None:
    """Write a checkpoint with seeded random weights."""
    from shared.models.presets import make_checkpoint

    make_checkpoint(preset, out, seed)
    Console(stderr=True).print(f"wrote {out}")


def show(
    model: Annotated[str, typer.Argument(help="directory or hub id; empty: the embedded demo model")] = "",
) -> None:
    """Say what a checkpoint is, or why it cannot be served."""
    from shared.models.source import open_source

    source = open_source(model)
    spec = source.spec
    Console(highlight=False).print(
        f"{source.name}: {spec.family}, {len(spec.layers)} layers ({len(spec.moe_layers)} with experts), hidden "
        f"{spec.hidden}, {spec.router.experts} experts of {spec.expert_hidden}, top-{spec.router.top_k}, vocabulary "
        f"{spec.vocab_size}, context {spec.max_positions}, digest {source.digest[:12]}"
    )


def models_app() -> typer.Typer:
    """The ``models`` sub-command."""
    app = typer.Typer(no_args_is_help=True, help="Checkpoints: make one, look at one.")
    app.command()(make)
    app.command()(show)
    return app
