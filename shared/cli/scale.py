"""``moemesh scale``: have so many instances of a pool, and wait until they are there."""

import asyncio
import time
from collections.abc import Sequence
from typing import Annotated

import typer
from rich.console import Console

from shared.bus import Bus
from shared.cli.mesh import local_nats
from shared.cli.status import DEFAULT_NATS
from shared.errors import BusUnavailable, MoemeshError, Refused
from shared.membership import Member, Members
from shared.messages import Pool, PoolFacts, State, Subjects
from shared.pool_messages import Scale, ScalePlan

ASK_S = 10.0
POLL_S = 0.1


class NotScaled(MoemeshError):
    """The pool is not as large as it should be; carries why, or what holds it up."""


def scale(
    pool: Annotated[Pool, typer.Argument(help="attention or experts")],
    count: Annotated[int, typer.Argument(max=9999, help="instances that there should be", show_default=False)],
    dry_run: Annotated[bool, typer.Option("--dry-run", help="only say what would happen")] = False,
    wait: Annotated[float, typer.Option(min=0, help="seconds to wait until they are READY; 0: do not wait")] = 300.0,
    nats: Annotated[
        str, typer.Option(envvar="MOEMESH_NATS", help="URL of the NATS server; else that of `moemesh up`, or port 4222")
    ] = "",
    mesh: Annotated[str, typer.Option(envvar="MOEMESH_MESH", help="name of the mesh")] = "default",
) -> None:
    """Start or drain instances of a pool, while requests are served."""
    request = Scale(pool=pool, count=count, dry_run=dry_run)
    out = Console(highlight=False)
    asyncio.run(ask(nats or local_nats(mesh) or DEFAULT_NATS, mesh, request, out, 0.0 if dry_run else wait))


async def ask(nats: str, mesh: str, request: Scale, out: Console, wait_s: float) -> None:
    """Ask the leading scheduler, say what will happen, and wait for it. Raises NotScaled."""
    bus = await Bus.connect(nats, "moemesh-scale")
    members = Members(mesh)
    try:
        await members.watch(bus)
        plan = await bus.request(Subjects(mesh).scheduler("scale"), request, ScalePlan, ASK_S)
        for line in explain(request, plan):
            out.print(line, soft_wrap=True)
        if wait_s:
            await until_reached(members, request.pool, request.count, wait_s)
            out.print(f"{request.pool}: {request.count} ready")
    except BusUnavailable as error:
        raise NotScaled(f"no scheduler of mesh {mesh!r} answers on {nats}; is it up? (moemesh status)") from error
    except Refused as refusal:
        raise NotScaled(refusal.message) from refusal
    finally:
        await bus.close()


def explain(request: Scale, plan: ScalePlan) -> list[str]:
    """What will happen, in words."""
    more = request.count - plan.present
    what = "nothing to do" if not more else f"{plan.actuator} {'starts' if more > 0 else 'drains'} {abs(more)}"
    return [f"{request.pool}: {plan.present} now, {request.count} wanted: {what}", *plan.notes]


async def until_reached(members: Members, pool: Pool, count: int, wait_s: float) -> None:
    """Raises NotScaled when the actuator has failed, somebody asks for something else, or the time is over."""
    give_up = time.monotonic() + wait_s
    while not reached(members.all(), pool, count):
        if problem := failure(members.all(), pool, count):
            raise NotScaled(problem)
        if time.monotonic() > give_up:
            raise NotScaled(f"not within {wait_s:g} s: {standing(members.all(), pool, count)}")
        await asyncio.sleep(POLL_S)


def reached(members: Sequence[Member], pool: Pool, count: int) -> bool:
    """Whether the leader desires so many, as many are READY, and no other one starts or leaves."""
    states = [m.heartbeat.state for m in members if m.heartbeat.kind is pool.kind]
    wanted = any(fact.desired == count for fact in wishes(members, pool))
    return wanted and states == [State.READY] * count


def failure(members: Sequence[Member], pool: Pool, count: int) -> str:
    """Why it will not come to ``count`` soon; empty while it may."""
    said = wishes(members, pool)
    problem = next((fact.problem for fact in said if fact.desired == count), None)
    if said and problem is None:
        return f"{pool}: somebody else wants {said[0].desired} meanwhile"
    return f"{problem}; the scheduler goes on trying" if problem else ""


def wishes(members: Sequence[Member], pool: Pool) -> list[PoolFacts]:
    """What leaders say of a pool: the one there is, none, or also one that has just died."""
    return [fact for member in members for fact in member.heartbeat.pools if fact.pool is pool]


def standing(members: Sequence[Member], pool: Pool, count: int) -> str:
    """Who is there, and what those say that are not READY."""
    there = [m.heartbeat for m in members if m.heartbeat.kind is pool.kind]
    ready = [beat for beat in there if beat.state is State.READY]
    others = [f"{beat.id} is {beat.state} {beat.detail}".strip() for beat in there if beat not in ready]
    return "; ".join([f"{pool}: {len(ready)} of {count} ready", *others])
