"""Whoever fails in the middle of a group's step, by whichever way: the others get the local bytes, and group again."""

import itertools
import threading
from collections.abc import Callable, Sequence
from typing import Any

import pytest

from services.attention import groups
from services.attention.mesh_exchange import MeshExchange
from services.attention.ways import Gate, Phase
from shared.transport.base import FrameKind
from shared.transport.faults import Faults, Rates
from shared.transport.memory import MemoryNetwork, MemoryTransport
from tests.unit.toy_groups import GroupMesh, group_mesh, run_step

WAYS = [way for way in itertools.product(Phase, Gate) if way != (Phase.ONE, Gate.ATTENTION)]
"""The one left out exchanges nothing between members."""
ROWS = (3, 5, 2)
NODES = ("x", "x", "y", "y")
LEADER, MEMBER, RELAY, LEAF = range(4)
"""The first and the last attention instance; the first instance of a node, and one that it passes rows on to."""
TIMES: dict[str, Any] = {"deadline": 0.08, "give_up": 5.0}


SILENT = [(*way, victim, False) for way in WAYS for victim in (LEADER, MEMBER)]
BEHIND = [(Phase.RELAY, Gate.EXPERTS, RELAY, False), (Phase.RELAY, Gate.ATTENTION, LEAF, False)]
BEFORE = [(Phase.ONE, Gate.EXPERTS, LEAF, False), (Phase.DIRECT, Gate.ATTENTION, LEAF, False)]
CLOSED = [(Phase.RELAY, Gate.EXPERTS, victim, True) for victim in (LEADER, MEMBER, RELAY, LEAF)]
CASES = [
    pytest.param(*case, id=f"{case[0]}-{case[1]}-{['leader', 'member', 'relay', 'leaf'][case[2]]}-{case[3]}")
    for case in SILENT + BEHIND + BEFORE + CLOSED
]
"""``close``: the transport knows that the victim is gone; else it is only silent."""


class Died(Exception):
    """An attention instance ends in the middle of a step."""


@pytest.fixture(autouse=True)
def patient_meetings(monkeypatch: pytest.MonkeyPatch) -> None:
    """Threads of a test are slow to begin their steps."""
    monkeypatch.setattr(groups, "SHORTEST_WAIT_S", 0.1)
    monkeypatch.setattr(groups, "LONGEST_WAIT_S", 0.1)


def nothing(number: int) -> None:
    """Goes wrong."""


def run(mesh: GroupMesh, who: Sequence[int], steps: int, between: Callable[[int], None] = nothing) -> list[bool]:
    """Members ``who`` run steps at the same time; whether each step had its experts. They end within a bounded time."""
    barrier = threading.Barrier(len(who))
    outcomes: list[bool] = []
    failures: list[BaseException] = []

    def work(number: int) -> None:
        try:
            barrier.wait(20)
            for step in range(steps):
                exchange = mesh.members[number].exchange
                outcomes.append(run_step(exchange, ROWS[number], 100 * step + number, lambda: between(number)))
        except Died:
            return
        except BaseException as error:  # noqa: BLE001 - reported by the test's thread
            failures.append(error)
            barrier.abort()

    threads = [threading.Thread(target=work, args=(number,), daemon=True) for number in who]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert not any(thread.is_alive() for thread in threads), "a member waits for ever"
    assert not failures, failures
    return outcomes


def until_grouped(mesh: GroupMesh, who: Sequence[int], gone: Sequence[int] = ()) -> None:
    """Members run steps until each has run one in a group to its end. Bounded."""
    for _ in range(5):
        for number in who:
            mesh.members[number].exchange.update(mesh.view(who, gone))
        before = counts(mesh, who)
        assert all(run(mesh, who, 6))
        if all(now[0] - then[0] > now[1] - then[1] for then, now in zip(before, counts(mesh, who), strict=True)):
            return
    pytest.fail("no group of all members was formed")


def counts(mesh: GroupMesh, who: Sequence[int]) -> list[tuple[int, int]]:
    locksteps = [mesh.members[number].exchange._lockstep for number in who]
    return [(lockstep.formed, lockstep.broken) for lockstep in locksteps]


def transport_of(exchange: MeshExchange) -> MemoryTransport:
    transport = exchange._transport
    assert isinstance(transport, MemoryTransport)
    return transport


def assert_nothing_leaked(mesh: GroupMesh, who: Sequence[int]) -> None:
    """Every received frame was released: the window of receives is finite."""
    for number in who:
        exchange = mesh.members[number].exchange
        exchange.idle_wait(0.05)
        assert len(transport_of(exchange)._free) == 64
        assert not exchange._inbox.open


def harm(mesh: GroupMesh, victim: int, close: bool) -> None:
    exchanges = [mesh.members[0].exchange, mesh.members[-1].exchange]
    transports = [*map(transport_of, exchanges), mesh.instances[0].transport, mesh.instances[1].transport]
    transports[victim].close() if close else mesh.network.cut(transports[victim].address)


@pytest.mark.parametrize(("phase", "gate", "victim", "close"), CASES)
def test_one_that_fails_in_the_middle_of_a_step_costs_nobody_else_a_byte(phase, gate, victim, close):
    dies = {LEADER: 0, MEMBER: 2}.get(victim, -1)
    once = threading.Lock()

    def between(number: int) -> None:
        if number == (0 if dies < 0 else dies) and once.acquire(blocking=False):
            harm(mesh, victim, close)
            if number == dies:
                raise Died

    with group_mesh(3, NODES, phase, gate, **TIMES) as mesh:
        until_grouped(mesh, (0, 1, 2))
        assert all(run(mesh, (0, 1, 2), 1, between))
        survivors = [number for number in range(3) if number != dies]
        gone = [] if dies >= 0 else [victim - RELAY]
        until_grouped(mesh, survivors, gone)
        assert_nothing_leaked(mesh, survivors)


RATES = Rates(drop=0.02, duplicate=0.1, delay=0.1, reorder=0.1)
MEASURING = (FrameKind.PING, FrameKind.PONG)


@pytest.mark.parametrize(("phase", "gate"), WAYS)
def test_a_network_that_loses_repeats_and_reorders_frames_changes_no_byte(phase, gate):
    faults = Faults(5, {kind: RATES for kind in FrameKind if kind not in MEASURING}, longest=0.01)
    with group_mesh(3, NODES, phase, gate, network=MemoryNetwork(faults), **TIMES) as mesh:
        for _ in range(2):
            assert all(run(mesh, (0, 1, 2), 4))
            for member in mesh.members:
                member.exchange.update(mesh.view())
        assert faults.counts
        assert any(formed for formed, _ in counts(mesh, (0, 1, 2)))
        mesh.network.faults = None
        until_grouped(mesh, (0, 1, 2))
        assert_nothing_leaked(mesh, (0, 1, 2))
