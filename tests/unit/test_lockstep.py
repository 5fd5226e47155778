"""What an attention instance makes of its neighbours' frames: late, doubled or impossible ones change nothing."""

import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import pytest
import torch

from services.attention import groups
from services.attention.exchange import ExpertInstance, Neighbour, View
from services.attention.groups import Group, Join, Observed
from services.attention.mesh_exchange import MeshExchange
from services.attention.ways import APART, SOLO, Gate, Phase, Way, Ways
from shared.transport.base import FrameKind, Header
from shared.transport.memory import MemoryNetwork, MemoryTransport
from tests.unit.toy_experts import HIDDEN, LAYERS, MESH, everywhere, make_exchange, toy_mesh
from tests.unit.toy_groups import group_mesh, run_step

ME, OTHER, THIRD = 900, 1, 2
SLOTS = 16


@pytest.fixture(autouse=True)
def patient_meetings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(groups, "SHORTEST_WAIT_S", 0.3)
    monkeypatch.setattr(groups, "LONGEST_WAIT_S", 0.3)


class Another:
    """An attention instance that does what the test says."""

    def __init__(self, network: MemoryNetwork, incarnation: int) -> None:
        self.transport = network.transport()
        self.incarnation = incarnation
        self.joins = 0

    def send(self, to: MeshExchange, kind: FrameKind, meta: bytes = b"", rows: int = 0, **fields: Any) -> None:
        frame = self.transport.outgoing(len(meta), rows, HIDDEN, torch.float32)
        frame.meta[:] = memoryview(meta)
        frame.rows[:] = 1.0
        header = Header(kind, MESH, self.incarnation, **{"sequence": 0, **fields})
        self.transport.send([self.transport.connect(to.address)], header, frame)

    def join(self, to: MeshExchange, rows: int = 2, observed: Observed | None = None) -> None:
        self.joins += 1
        meta = Join.pack(rows, 1.0) + (observed.pack() if observed else b"")
        self.send(to, FrameKind.JOIN, meta, sequence=self.joins)

    def kinds(self) -> set[int]:
        """Of the frames that have come."""
        found = set()
        while (incoming := self.transport.receive(0.05)) is not None:
            found.add(incoming.header.kind)
            incoming.release()
        return found

    def expect(self, kind: FrameKind) -> Header:
        """The next frame of that kind; others are dropped."""
        while True:
            incoming = self.transport.receive(20)
            assert incoming is not None, f"no {kind.name} came"
            header = incoming.header
            incoming.release()
            if header.kind == kind:
                return header


def transport_of(exchange: MeshExchange) -> MemoryTransport:
    transport = exchange._transport
    assert isinstance(transport, MemoryTransport)
    return transport


@contextmanager
def neighbours(mine: str, **others: int) -> Iterator[tuple[MeshExchange, list[Another]]]:
    """An exchange of the instance with the id ``mine``, and other instances by id."""
    network = MemoryNetwork()
    with ExitStack() as stack:
        exchange = make_exchange(network.transport(receive_slots=SLOTS), group_wait=0.1)
        stack.callback(exchange.close)
        made = {name: Another(network, incarnation) for name, incarnation in others.items()}
        known = {name: Neighbour(one.incarnation, one.transport.address) for name, one in made.items()}
        exchange.update(View(neighbours={mine: Neighbour(ME, exchange.address)} | known))
        yield exchange, list(made.values())


def begin(exchange: MeshExchange, rows: int, answer: Callable[[], None]) -> bool:
    """Begin a step while the others do their part."""
    results: list[bool] = []
    thread = threading.Thread(target=lambda: results.append(exchange.begin(rows)), daemon=True)
    thread.start()
    answer()
    thread.join(20)
    assert results, "the step did not begin"
    return results[0]


def group(*members: tuple[int, int]) -> Group:
    return Group(77, members, SOLO, 0, 0)


def told(one: Another, to: MeshExchange, group: Group, late: int = 0, copies: int = 1) -> None:
    """The host's answer to the join that comes; ``late``: to one so many before it."""
    number = one.expect(FrameKind.JOIN).sequence
    for _ in range(copies):
        one.send(to, FrameKind.GROUP, group.pack(), sequence=number - late, group=group.number)
    if late:
        one.send(to, FrameKind.GROUP, b"", sequence=number)


def test_a_step_begins_in_the_group_that_the_host_tells():
    with neighbours("a1", a0=OTHER) as (exchange, [host]):
        assert begin(exchange, 3, lambda: told(host, exchange, group((OTHER, 2), (ME, 3))))


@pytest.mark.parametrize(
    "members",
    [((555, 1), (ME, 3)), ((OTHER, 2), (ME, 4)), ((OTHER, 2), (555, 3)), ((OTHER, 2**60), (ME, 3)), ((ME, 3), (ME, 3))],
    ids=["a leader whom we do not know", "other rows", "without us", "too many rows", "twice"],
)  # fmt: skip
def test_one_goes_alone_rather_than_in_a_group_that_cannot_work(members):
    with neighbours("a1", a0=OTHER) as (exchange, [host]):
        assert not begin(exchange, 3, lambda: told(host, exchange, group(*members)))
        exchange.end()


def test_the_answer_to_an_earlier_join_is_declined_and_its_members_are_told():
    with neighbours("a1", a0=OTHER) as (exchange, [host]):
        assert not begin(exchange, 3, lambda: told(host, exchange, group((OTHER, 2), (ME, 3)), late=1))
        assert host.expect(FrameKind.LEAVE).group == 77


def test_a_second_copy_of_the_answer_breaks_nothing():
    with neighbours("a1", a0=OTHER) as (exchange, [host]):
        assert begin(exchange, 3, lambda: told(host, exchange, group((OTHER, 2), (ME, 3)), copies=2))
        exchange.idle_wait(0.05)
        assert exchange._lockstep.group is not None
        assert FrameKind.LEAVE not in host.kinds()


def test_who_hears_of_a_groups_end_before_its_beginning_goes_alone():
    def answer() -> None:
        number = host.expect(FrameKind.JOIN).sequence
        host.send(exchange, FrameKind.LEAVE, group=77)
        host.send(exchange, FrameKind.GROUP, group((OTHER, 2), (ME, 3)).pack(), sequence=number, group=77)

    with neighbours("a1", a0=OTHER) as (exchange, [host]):
        assert not begin(exchange, 3, answer)


def test_copies_of_a_members_rows_take_no_memory_beyond_the_step():
    with neighbours("a1", a0=OTHER) as (exchange, [host]):
        assert begin(exchange, 3, lambda: told(host, exchange, group((ME, 3), (OTHER, 2))))
        for number in range(3 * SLOTS):
            host.send(exchange, FrameKind.DISPATCH, rows=2, sequence=1 + number // 2, group=77, layer=number)
        while exchange._receive(0.05):
            pass
        assert len(transport_of(exchange)._free) == SLOTS - 1
        exchange.end()
        assert len(transport_of(exchange)._free) == SLOTS


def test_who_sends_rows_to_a_group_that_is_over_is_told_so_at_once():
    with neighbours("a1", a0=OTHER) as (exchange, [host]):
        host.send(exchange, FrameKind.DISPATCH, rows=2, sequence=1, group=77, layer=1)
        exchange.idle_wait(0.05)
        assert host.expect(FrameKind.LEAVE).group == 77


@pytest.mark.parametrize("kind", [FrameKind.JOIN, FrameKind.GROUP], ids=lambda kind: kind.name)
@pytest.mark.parametrize("meta", [b"", b"\0" * 7, b"\0" * 8, b"\xff" * 36, b"\xff" * 4000], ids=len)
def test_nonsense_from_a_neighbour_is_dropped(kind, meta):
    with neighbours("a1", a0=OTHER) as (exchange, [host]):
        host.send(exchange, kind, meta, group=77)
        exchange.idle_wait(0.05)
        assert len(transport_of(exchange)._free) == SLOTS
        assert exchange._lockstep.group is None


def test_an_idle_host_that_is_woken_does_its_own_work_even_while_others_meet():
    with neighbours("a0", a1=OTHER, a2=THIRD) as (exchange, others):
        for one in others:
            one.join(exchange)
        exchange.idle_wait(0.5)
        others[0].join(exchange)  # now the third is waited for
        thread = threading.Thread(target=exchange.idle_wait, args=(60,), daemon=True)
        exchange.wake()
        thread.start()
        thread.join(20)
        assert not thread.is_alive()


def test_the_leader_of_a_group_tells_a_host_that_had_no_part_in_it_what_it_took():
    with neighbours("a1", a0=OTHER, a2=THIRD) as (exchange, [host, _]):
        assert begin(exchange, 3, lambda: told(host, exchange, group((ME, 3), (THIRD, 2))))
        exchange._choice.exchanged(0.004)
        exchange.end()
        assert exchange._lockstep._observed == Observed(5, 2, SOLO, 0.004)
        assert begin(exchange, 3, lambda: told(host, exchange, group((OTHER, 2), (ME, 3))))
        exchange._choice.exchanged(0.004)
        exchange.end()
        assert exchange._lockstep._observed is None, "the host was there"


def test_a_member_tells_what_exchanges_of_its_own_took_also_when_the_host_was_there():
    with neighbours("a1", a0=OTHER) as (exchange, [host]):
        apart = group((OTHER, 2), (ME, 3))._replace(way=APART)
        assert begin(exchange, 3, lambda: told(host, exchange, apart))
        exchange._choice.exchanged(0.004)
        exchange.end()
        assert exchange._lockstep._observed == Observed(5, 2, APART, 0.004)


def test_a_step_of_exchanges_of_their_own_takes_as_long_as_the_slowest_member():
    with neighbours("a0", a1=OTHER) as (exchange, _):
        exchange.use(Ways())
        seen: list[float] = []
        exchange._choice.ways.observe = lambda shape, way, seconds: seen.append(seconds)
        for seconds in (0.001, 0.003, 0.004, 0.002):
            exchange._choice.learn(Observed(5, 2, APART, seconds))
        assert seen == [0.003, 0.004]


def test_an_idle_host_learns_what_the_ways_that_it_chose_have_taken():
    with neighbours("a0", a1=OTHER) as (exchange, [member]):
        exchange.use(Ways())
        seen = Observed(5, 2, Way(Phase.ONE), 0.003)
        learned: list[Observed] = []
        exchange._lockstep._learn = learned.append
        member.join(exchange, observed=seen)
        member.send(exchange, FrameKind.JOIN, Join.pack(2, 1.0) + seen.pack(), sequence=1)  # a late copy
        exchange.idle_wait(0.1)
        assert learned == [seen]
        exchange._choice.learn(seen)
        [size] = exchange._choice.ways._sizes.values()
        assert size.steps == 1


# ---- beside groups ------------------------------------------------------------------------------------------


def test_a_step_without_any_expert_begins_and_ends():
    with neighbours("a0") as (exchange, _):
        assert not exchange.begin(5)
        exchange.end()


def test_links_are_measured_when_the_placement_comes_after_the_instances():
    with toy_mesh(everywhere(2), deadline=2.0) as mesh:
        exchange = make_exchange(mesh.network.transport(), deadline=2.0)
        found = [
            ExpertInstance(i.facts.id, i.facts.incarnation, i.facts.address, 0.0, node="x") for i in mesh.instances
        ]
        instances = {one.id: one for one in found}
        exchange.update(View(None, instances, {}, "a"))
        exchange.update(View(mesh.placement, instances, {}, "a"))
        assert len(exchange._choice._links) == 2
        exchange.close()


def test_a_refusal_behind_a_relay_is_repeated_directly_without_waiting_for_a_deadline():
    with group_mesh(1, ("x", "x"), Phase.RELAY, Gate.EXPERTS, deadline=30.0, give_up=60.0) as mesh:
        mesh.instances[1].server.adopt([]).result(20)
        exchange = mesh.members[0].exchange
        assert run_step(exchange, 3, seed=1)
        assert exchange.stats().refusals["no_relay"] == 1
        assert len(LAYERS) == exchange.stats().exchanges
        assert not exchange.stats().repeats["relay"]
