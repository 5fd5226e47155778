"""``moemesh rebalance``: have replicas moved to where they help, or to where a file says; shows what moves."""

import asyncio
import json
import time
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from shared.bus import Bus
from shared.changes import Outcome, Rebalance, RebalancePlan, Ticket
from shared.cli.mesh import local_nats
from shared.cli.status import DEFAULT_NATS
from shared.errors import BusUnavailable, ConfigError, MoemeshError, Refused
from shared.messages import Subjects

ASK_S = 60.0
"""Planning a large model takes seconds."""
POLL_S = 0.2
SILENCE_S = 20.0
"""So long no scheduler may lead before nobody knows the outcome."""


class NotRebalanced(MoemeshError):
    """The placement stays as it was, or nobody can say; carries why."""


def rebalance(
    dry_run: Annotated[bool, typer.Option("--dry-run", help="only show what would move")] = False,
    homes: Annotated[
        Path | None, typer.Option(help="JSON file {layer: {instance: [experts]}}; else where activity says")
    ] = None,
    nats: Annotated[
        str, typer.Option(envvar="MOEMESH_NATS", help="URL of the NATS server; else that of `moemesh up`, or port 4222")
    ] = "",
    mesh: Annotated[str, typer.Option(envvar="MOEMESH_MESH", help="name of the mesh")] = "default",
) -> None:
    """Move expert replicas between instances, while requests are served."""
    request = Rebalance(dry_run=dry_run, given=read_homes(homes) if homes else {})
    out = Console(highlight=False)
    asyncio.run(ask(nats or local_nats(mesh) or DEFAULT_NATS, mesh, request, out))


def read_homes(path: Path) -> dict[int, dict[str, tuple[int, ...]]]:
    """Layer -> instance -> experts. Raises ConfigError when the file holds something else."""
    try:
        return Rebalance.model_validate({"given": json.loads(path.read_text())}).given
    except OSError as error:
        raise ConfigError("--homes", f"{path}: {error.strerror}") from error
    except ValueError as error:
        raise ConfigError("--homes", f"{path} is not JSON like {{'0': {{'experts-0': [0, 1]}}}}: {error}") from error


async def ask(nats: str, mesh: str, request: Rebalance, out: Console) -> None:
    """Ask the leading scheduler, print its plan, and wait until it is carried out. Raises NotRebalanced, Refused."""
    bus = await Bus.connect(nats, "moemesh-rebalance")
    subjects = Subjects(mesh)
    try:
        plan = await bus.request(subjects.scheduler("rebalance"), request, RebalancePlan, ASK_S)
        print_plan(plan, out)
        if plan.ticket:
            out.print((await until_ended(bus, subjects, plan.ticket)).text)
    except BusUnavailable as error:
        raise NotRebalanced(f"no scheduler of mesh {mesh!r} answers on {nats}; is it up? (moemesh status)") from error
    except Refused as refusal:
        raise NotRebalanced(refusal.message) from refusal
    finally:
        await bus.close()


async def until_ended(bus: Bus, subjects: Subjects, ticket: str) -> Outcome:
    """The outcome once it is committed. Raises NotRebalanced when it was aborted or its scheduler is gone."""
    heard = time.monotonic()
    while True:
        try:
            outcome = await bus.request(subjects.scheduler("outcome"), Ticket(ticket=ticket), Outcome, 1.0)
            heard = time.monotonic()
        except BusUnavailable:
            outcome = Outcome(state="open")
        if outcome.state == "committed":
            return outcome
        if outcome.state == "unknown" or time.monotonic() - heard > SILENCE_S:
            raise NotRebalanced("the scheduler that carried it out is gone; see `moemesh status` for what is in use")
        if outcome.state == "aborted":
            raise NotRebalanced(f"aborted, the old placement stays: {outcome.text}")
        await asyncio.sleep(POLL_S)


def print_plan(plan: RebalancePlan, out: Console) -> None:
    """A row for each layer, and what they add up to."""
    table = Table("layer", "replicas to load", "MB", "most activated experts: now", "then", box=None)
    for row in plan.layers:
        values = (row.layer, row.moved, f"{row.bytes / 1e6:.1f}", expected(row.before), expected(row.after))
        table.add_row(*map(str, values))
    out.print(table)
    moved, size = (sum(values) for values in zip(*((row.moved, row.bytes) for row in plan.layers), strict=True))
    out.print(f"{moved} replicas in {len(plan.layers)} layers, {size / 1e6:.1f} MB")


def expected(a_max: float | None) -> str:
    """Activated experts on the busiest instance, as far as they are known."""
    return "?" if a_max is None else f"{a_max:.2f}"
