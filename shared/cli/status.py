"""``moemesh status``: who is in the mesh, in which state, with which layers, experts and placement."""

import asyncio
import json
from collections.abc import Iterable, Iterator
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from shared.bus import Bus
from shared.changes import Phase, PlacementRecord
from shared.cli.mesh import local_nats
from shared.errors import MoemeshError
from shared.membership import Member, Members
from shared.messages import Placement, Subjects
from shared.placement_watch import read_record, waits_for

DEFAULT_NATS = "nats://127.0.0.1:4222"
LISTEN_S = 1.5
"""Longer than a heartbeat interval, so that everybody alive was heard."""


def status(
    nats: Annotated[
        str, typer.Option(envvar="MOEMESH_NATS", help="URL of the NATS server; else that of `moemesh up`, or port 4222")
    ] = "",
    mesh: Annotated[str, typer.Option(envvar="MOEMESH_MESH", help="name of the mesh")] = "default",
    as_json: Annotated[bool, typer.Option("--json", help="one JSON object instead of a table")] = False,
) -> None:
    """Show the instances of a mesh and its placement."""
    nats = nats or local_nats(mesh) or DEFAULT_NATS
    members, record = asyncio.run(look(nats, mesh))
    if not members:
        raise MoemeshError(f"no instance of mesh {mesh!r} answers on {nats}; is it up? (moemesh up)")
    report = describe(members, record)
    if as_json:
        print(json.dumps(report))
    else:
        print_report(report, Console(highlight=False))


async def look(nats: str, mesh: str) -> tuple[list[Member], PlacementRecord | None]:
    """Listen to the mesh for LISTEN_S seconds. Raises BusUnavailable."""
    bus = await Bus.connect(nats, "moemesh-status")
    try:
        members = Members(mesh)
        await members.watch(bus)
        await asyncio.sleep(LISTEN_S)
        record, _ = await read_record(await bus.store(Subjects(mesh).bucket))
        return members.all(), record
    finally:
        await bus.close()


def describe(members: list[Member], record: PlacementRecord | None) -> dict[str, Any]:
    """The report as plain values; pure."""
    return {
        "placement": describe_placement(record.committed) if record and record.committed else None,
        "change": describe_change(record, members) if record else None,
        "pools": describe_pools(members),
        "autoscaling": describe_autoscaling(members),
        "instances": [describe_member(m) for m in sorted(members, key=lambda m: (m.heartbeat.kind, m.heartbeat.id))],
    }


def describe_placement(placement: Placement) -> dict[str, Any]:
    """Version, author and how many experts each instance is a home of."""
    masks = memoryview(placement.homes).cast("Q")
    homes = {name: sum(mask >> i & 1 for mask in masks) for i, name in enumerate(placement.instances)}
    return {
        "version": placement.version,
        "author": placement.author,
        "reason": placement.reason,
        "layers": len(placement.moe_layers),
        "experts_per_layer": placement.experts,
        "homes": homes,
    }


def describe_change(record: PlacementRecord, members: list[Member]) -> dict[str, Any]:
    """What is under way with the placement, who is waited for, and how the last change ended."""
    new = {Phase.PREPARE: record.other, Phase.COMMIT: record.committed}.get(record.phase)
    return {
        "phase": record.phase.value,
        "version": new.version if new else None,
        "reason": new.reason if new else "",
        "waits_for": waits_for(record, members),
        "last": record.verdict,
    }


def describe_pools(members: list[Member]) -> dict[str, Any]:
    """Pools whose size somebody has asked for: how many there should be and are, and why a change has failed."""
    facts = [facts for member in members for facts in member.heartbeat.pools]
    kinds = [member.heartbeat.kind for member in members if member.ready]
    return {
        fact.pool.value: {
            "desired": fact.desired,
            "ready": kinds.count(fact.pool.kind),
            "problem": fact.problem,
        }
        for fact in facts
    }


def describe_autoscaling(members: list[Member]) -> dict[str, Any] | None:
    """What sizes the pools by demand, None where nothing does."""
    facts = next((member.heartbeat.autoscale for member in members if member.heartbeat.autoscale), None)
    return facts.model_dump() if facts else None


def describe_member(member: Member) -> dict[str, Any]:
    """One instance: identity, state, and the facts of its kind."""
    beat = member.heartbeat
    facts: dict[str, Any] = {}
    if beat.attention:
        facts = beat.attention.model_dump(exclude={"address"})
    elif beat.experts:
        facts = beat.experts.model_dump(exclude={"address"})
    elif beat.placement:
        facts = {"placement": beat.placement}
    return {
        "id": beat.id,
        "kind": beat.kind.value,
        "state": "suspect" if member.suspect else beat.state.value,
        "node": beat.node,
        "device": beat.device,
        "paced": beat.paced,
        "url": beat.url,
        "detail": beat.detail,
        "model": beat.model.model_dump() if beat.model else None,
        "facts": facts,
    }


def print_report(report: dict[str, Any], out: Console) -> None:
    """A table for a person."""
    placement = report["placement"]
    if placement:
        out.print(
            f"placement {placement['version']} by {placement['author']} ({placement['reason']}): "
            f"{placement['layers']} layers x {placement['experts_per_layer']} experts"
        )
    print_change(report["change"], out)
    for pool, facts in report["pools"].items():
        out.print(facts["problem"] or f"{pool}: {facts['desired']} wanted, {facts['ready']} ready")
    for line in autoscaling(report["autoscaling"]):
        out.print(line, soft_wrap=True)
    table = Table("instance", "state", "node", "device", "serves", box=None, header_style="bold")
    table.add_column("url", no_wrap=True, min_width=max((len(row["url"]) for row in report["instances"]), default=0))
    for row in report["instances"]:
        table.add_row(row["id"], row["state"], row["node"][:12], device(row), serves(row, placement), row["url"])
    out.print(table)
    for row in report["instances"]:
        for line in ways(row["facts"].get("ways", ())):
            out.print(f"{row['id']}: {line}")


def autoscaling(facts: dict[str, Any] | None) -> Iterator[str]:
    """What the autoscaler sees, expects and does, line by line."""
    if facts:
        speed = f"{facts['tpot_s'] * 1e3:.1f} ms per token" if facts["tpot_s"] else "no tokens"
        asked = f"{facts['rate']:.3g} requests/s, {facts['open']} open, {speed}"
        yield f"autoscaling {facts['mode']}: {asked}: {facts['doing']}"
        sizes = ", ".join(f"{count} {pool}" for pool, count in facts["sizes"].items())
        if sizes:
            yield f"right would be {sizes}: {facts['why']}"


def ways(table: Iterable[dict[str, Any]]) -> Iterator[str]:
    """The cost table of one attention instance, one line per size of exchange: the chosen way first."""
    sizes: dict[tuple[int, int], list[dict[str, Any]]] = {}
    for row in table:
        sizes.setdefault((row["members"], row["rows"]), []).append(row)
    for (members, rows), found in sorted(sizes.items()):
        tried = ", ".join(_way(row) for row in sorted(found, key=lambda row: not row["chosen"]))
        yield f"exchanges of up to {rows} rows of {members} instances: {tried}"


def _way(row: dict[str, Any]) -> str:
    measured = f"{row['measured_s'] * 1e3:.2f} ms" if row["measured_s"] is not None else "not tried"
    return f"{row['way']} {measured} (links alone {row['predicted_s'] * 1e3:.2f} ms)"


def print_change(change: dict[str, Any] | None, out: Console) -> None:
    """One line about what is under way, or how the last change ended if that was no success."""
    if change and change["version"]:
        waits = ", ".join(change["waits_for"]) or "the scheduler"
        out.print(f"{change['phase']} placement {change['version']} ({change['reason']}), waiting for {waits}")
    if change and change["last"]:
        out.print(f"last change: {change['last']}")


def device(row: dict[str, Any]) -> str:
    """Where an instance computes, and whether its speed is a profile's."""
    return f"{row['device']}, paced by {row['paced']}" if row["paced"] else row["device"]


def serves(row: dict[str, Any], placement: dict[str, Any] | None) -> str:
    """What an instance does, in a few words."""
    facts = row["facts"]
    if row["kind"] == "attention" and facts:
        load = f"{facts['running']} running, {facts['waiting']} waiting"
        experts = "monolith" if facts["monolith"] else f"placement {facts['placement']}"
        return f"{load}, KV {facts['kv_blocks_used']}/{facts['kv_blocks']}, {experts}"
    if row["kind"] == "experts" and facts:
        homes = placement["homes"].get(row["id"], 0) if placement else 0
        return f"home of {homes} experts, {resident(facts)}, placement {facts['placement']}"
    return row["detail"]


def resident(facts: dict[str, Any]) -> str:
    """How many experts an instance has loaded; where they come and go, how often exchanges waited for them."""
    elastic = facts["elastic"]
    if not elastic:
        return f"{facts['replicas']} resident"
    share = elastic["waits"] / max(1, elastic["calls"])
    starts = f"{elastic['warm']} warm and {elastic['cold']} cold starts"
    cost = ", ".join(f"{form} {value / 1e9:.3g}" for form, value in elastic["cost"].items())
    return f"{facts['replicas']} of {elastic['slots']} slots used, {share:.1%} of calls waited, {starts}, GB s: {cost}"
