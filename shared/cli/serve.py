"""``moemesh serve KIND``: one service in this process, configured by flags or MOEMESH_* variables.

The flags are made from the service's config dataclass, so that a setting is written down once.
"""

import ctypes
import inspect
import os
import signal
import sys
from collections.abc import Callable
from dataclasses import fields
from importlib import import_module
from typing import Annotated, Any, Optional, get_type_hints

import typer

from shared.config import (
    AttentionConfig,
    ExpertsConfig,
    GatewayConfig,
    MeshConfig,
    SchedulerConfig,
    load_config,
)

SERVICES: dict[str, type[MeshConfig]] = {
    "gateway": GatewayConfig,
    "attention": AttentionConfig,
    "experts": ExpertsConfig,
    "scheduler": SchedulerConfig,
}


FOLLOW_PARENT = "MOEMESH_FOLLOW_PARENT"
"""Set by ``moemesh up`` for its children: stop when the parent is gone, even if it was killed."""
PR_SET_PDEATHSIG = 1


def follow_parent() -> None:
    """Ask Linux to send this process SIGTERM when its parent dies."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)


def run_service(kind: str, flags: dict[str, Any]) -> int:
    """Read the settings, import the service and run it until it is told to stop; returns the exit status."""
    if os.environ.get(FOLLOW_PARENT):
        follow_parent()
    config = load_config(SERVICES[kind], os.environ, flags)
    return import_module(f"services.{kind}.main").main(config)


def service_command(kind: str, config: type[MeshConfig]) -> Callable[..., None]:
    """A typer command whose parameters are the fields of ``config``; absent flags are None."""

    def command(**flags: Any) -> None:
        raise typer.Exit(run_service(kind, flags))

    hints = get_type_hints(config)
    parameters = []
    for f in fields(config):
        text = f"{f.metadata['help']} [default: {f.default!r}]"
        annotation = Annotated[Optional[hints[f.name]], typer.Option(help=text, show_default=False)]  # noqa: UP045
        parameters.append(
            inspect.Parameter(f.name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=annotation)
        )
    command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    command.__doc__ = f"Run one {kind} instance."
    return command


def service_app() -> typer.Typer:
    """The ``serve`` sub-command with one command per service."""
    app = typer.Typer(no_args_is_help=True, help="Run one service in this process (what the containers run).")
    for kind, config in SERVICES.items():
        app.command(kind)(service_command(kind, config))
    return app
