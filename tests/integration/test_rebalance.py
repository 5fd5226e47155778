"""Rebalancing a real mesh by hand while it serves: nothing fails, no byte changes, and what cannot be done is said."""

import io
import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from shared.bus import Bus
from shared.changes import PlacementRecord, Rebalance
from shared.cli.rebalance import NotRebalanced, ask, read_homes
from shared.cli.status import describe, look
from shared.errors import ConfigError
from shared.load_messages import Activated
from shared.messages import Subjects
from shared.placement_watch import read_record
from tests.mesh import RunningMesh, running_mesh
from tests.traffic import traffic

MESH = "rebalance"
LAYERS, EXPERTS, SLOTS = 6, 32, 18
BODY = {"prompt": "In the beginning God created", "max_tokens": 200, "temperature": 0, "ignore_eos": True}
LOW, HIGH = tuple(range(16)), tuple(range(16, 32))


@pytest.fixture(scope="module")
def mesh() -> Iterator[RunningMesh]:
    """Two instances with 18 slots per layer for 32 experts: only four have two homes."""
    with running_mesh(attention=1, experts=2, mesh=MESH, settings={"slots": str(LAYERS * SLOTS)}) as running:
        yield running


def rebalance(mesh: RunningMesh, request: Rebalance) -> str:
    """What a person sees."""
    out = io.StringIO()
    mesh.call(ask(mesh.mesh.nats_url, MESH, request, Console(file=out, width=120)))
    return out.getvalue()


def record(mesh: RunningMesh) -> PlacementRecord:
    async def read() -> PlacementRecord | None:
        bus = await Bus.connect(mesh.mesh.nats_url, "test")
        found, _ = await read_record(await bus.store(Subjects(MESH).bucket))
        await bus.close()
        return found

    found = mesh.call(read())
    assert found is not None
    return found


def halves(first: tuple[int, ...], second: tuple[int, ...], layers: range) -> Rebalance:
    return Rebalance(given={layer: {"experts-0": first, "experts-1": second} for layer in layers})


def test_homes_that_are_given_change_places_under_streams_without_a_failure_or_another_byte(mesh: RunningMesh) -> None:
    expected = mesh.complete(**BODY)["choices"][0]["text"]
    before = record(mesh)
    with traffic(mesh.url, BODY, 4) as streams:
        streams.until_more(streams.begun)
        shown = rebalance(mesh, halves(LOW, HIGH, range(LAYERS)))
        assert "is in use" in shown
        streams.until_more(streams.begun)
        rebalance(mesh, halves(HIGH, LOW, range(2)))
        streams.until_more(streams.finished)
        assert streams.end() == {expected}
    after = record(mesh)
    assert after.committed is not None
    assert before.committed is not None
    assert after.newest > before.newest + 1, "homes changed places in several versions"
    table = np.frombuffer(after.committed.homes, "<u8").reshape(LAYERS, EXPERTS)
    assert table[:2].tolist() == [[2] * 16 + [1] * 16] * 2
    assert table[2:].tolist() == [[1] * 16 + [2] * 16] * 4
    assert after.committed.reason == "rebalance by hand: 64 replicas in 2 layers"
    members, now = mesh.call(look(mesh.mesh.nats_url, MESH))
    assert describe(members, now)["change"]["phase"] == "settled"
    assert "is in use" in describe(members, now)["change"]["last"]


def test_a_rebalance_follows_what_exchanges_activate_and_a_dry_run_changes_nothing(mesh: RunningMesh) -> None:
    rebalance(mesh, halves((*LOW, 30, 31), HIGH, range(LAYERS)))
    before = record(mesh).newest
    mesh.call(tell(mesh, active=range(16)))
    shown = rebalance(mesh, Rebalance(dry_run=True))
    assert "replicas in" in shown
    assert record(mesh).newest == before
    assert "is in use" in rebalance(mesh, Rebalance())
    with pytest.raises(NotRebalanced, match="nothing to gain"):
        rebalance(mesh, Rebalance())


async def tell(mesh: RunningMesh, active: range) -> None:
    """Say that exchanges have activated the same experts in all layers, so often that the window is full of it."""
    mask = np.array([[sum(1 << e for e in active)]] * 512, "<u8").tobytes()
    bus = await Bus.connect(mesh.mesh.nats_url, "test")
    fields = {"attention": "attention-0", "incarnation": 1, "experts": EXPERTS, "seconds": 1.0, "rows": 512}
    for layer in range(LAYERS):
        await bus.publish(Subjects(MESH).activated, Activated(layer=layer, masks=mask, **fields))
    await bus.close()


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({1: {"experts-0": LOW}}, "layer 1, expert 16: has no home"),
        ({1: {"experts-0": (*LOW, 0), "experts-1": HIGH}}, "layer 1, expert 0: is on instance 0 twice"),
        ({1: {"experts-0": (*LOW, 16, 17, 18), "experts-1": HIGH}}, "layer 1, expert 18: does not fit"),
        ({7: {"experts-0": LOW}}, "layer 7 has no routed experts"),
    ],
)
def test_homes_that_cannot_be_served_are_refused_and_nothing_changes(mesh: RunningMesh, given, words: str) -> None:
    before = record(mesh)
    with pytest.raises(NotRebalanced, match=words):
        rebalance(mesh, Rebalance(given=given))
    assert record(mesh).newest == before.newest


async def test_without_a_scheduler_the_command_says_so(mesh: RunningMesh) -> None:
    with pytest.raises(NotRebalanced, match="no scheduler of mesh 'nowhere' answers"):
        await ask(mesh.mesh.nats_url, "nowhere", Rebalance(), Console(file=io.StringIO()))


def test_a_file_of_homes_is_read_and_another_one_refused(tmp_path: Path) -> None:
    path = tmp_path / "homes.json"
    path.write_text(json.dumps({"0": {"experts-0": [1, 2]}}))
    assert read_homes(path) == {0: {"experts-0": (1, 2)}}
    path.write_text('{"0": [1]}')
    with pytest.raises(ConfigError, match="--homes"):
        read_homes(path)
    with pytest.raises(ConfigError, match="No such file"):
        read_homes(tmp_path / "absent")
