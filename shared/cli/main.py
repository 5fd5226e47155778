"""The ``moemesh`` command: puts the sub-commands together and turns errors into one line and an exit status.

Each sub-command has its own file; heavy imports happen inside the command that needs them.
"""

import sys

import typer

from shared.cli.client import chat, complete
from shared.cli.doctor import doctor
from shared.cli.models import models_app
from shared.cli.plan import plan
from shared.cli.predictor import predictor_app
from shared.cli.profile import profile
from shared.cli.rebalance import rebalance
from shared.cli.replay import replay
from shared.cli.scale import scale
from shared.cli.serve import service_app
from shared.cli.simulate import simulate
from shared.cli.status import status
from shared.cli.trace import trace_app
from shared.cli.up import demo, up
from shared.errors import ConfigError, MoemeshError

EXIT_FAILED = 1
EXIT_USAGE = 2


def build_app() -> typer.Typer:
    """All commands."""
    app = typer.Typer(
        name="moemesh",
        no_args_is_help=True,
        add_completion=False,
        pretty_exceptions_enable=False,
        help="Serve Mixture-of-Experts language models as a mesh of small services.",
    )
    commands = (up, demo, status, scale, rebalance, profile, plan, simulate, replay, complete, chat, doctor)
    for command in commands:
        app.command()(command)
    app.add_typer(service_app(), name="serve")
    app.add_typer(models_app(), name="models")
    app.add_typer(predictor_app(), name="predictor")
    app.add_typer(trace_app(), name="trace")
    return app


def main() -> None:
    """Entry point; errors that we raise on purpose become one line on stderr."""
    try:
        build_app()()
    except MoemeshError as error:
        print(f"moemesh: {error}", file=sys.stderr)
        sys.exit(EXIT_USAGE if isinstance(error, ConfigError) else EXIT_FAILED)
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    main()
