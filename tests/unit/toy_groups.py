"""Toy meshes of several nodes: attention instances in threads that run steps together, experts behind them."""

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor

from services.attention.exchange import ExpertInstance, Neighbour, View
from services.attention.mesh_exchange import MeshExchange
from services.attention.pending import ExchangeStats
from services.attention.ways import Gate, Phase, Ways
from services.experts.answers import KnownPlacement
from services.experts.relay import Neighbour as ExpertNeighbour
from shared.errors import ExchangeUnavailable
from shared.kernels.base import Kernels
from shared.messages import Placement
from shared.transport.memory import MemoryNetwork
from tests.unit.toy_experts import (
    EXPERTS,
    HIDDEN,
    LAYERS,
    MAX_ROWS,
    MESH,
    TOP_K,
    ToyInstance,
    ToyKernels,
    ToyLayer,
    make_placement,
    random_rows,
    start_instance,
)


@dataclass
class Member:
    """One attention instance."""

    exchange: MeshExchange
    name: str
    neighbour: Neighbour


@dataclass
class GroupMesh:
    """Attention instances on node "a", expert instances on the nodes that ``nodes`` names."""

    network: MemoryNetwork
    members: list[Member]
    instances: list[ToyInstance]
    nodes: Sequence[str]
    placement: Placement
    rounded: bool = False
    """Answers need to be right to rounding only."""

    def view(self, members: Sequence[int] | None = None, gone: Sequence[int] = ()) -> View:
        """``members``: who is there; ``gone``: expert instances that are not. Heartbeats have just come."""
        facts = [
            ExpertInstance(i.facts.id, i.facts.incarnation, i.facts.address, time.monotonic(), node=node)
            for number, (i, node) in enumerate(zip(self.instances, self.nodes, strict=True))
            if number not in gone
        ]
        chosen = [m for n, m in enumerate(self.members) if members is None or n in members]
        neighbours = {m.name: m.neighbour for m in chosen}
        return View(self.placement, {f.id: f for f in facts}, neighbours, "a")

    def steps(self, rows: Sequence[int], count: int, prefill: int = -1) -> list[Exception | None]:
        """Every member runs ``count`` steps with so many rows of its own, at the same time as the others.

        ``prefill``: number of the member whose steps compute prompts.
        """
        barrier = threading.Barrier(len(self.members))
        failures: list[Exception | None] = [None] * len(self.members)

        def work(number: int) -> None:
            try:
                for step in range(count):
                    barrier.wait(60)
                    exchange = self.members[number].exchange
                    seed, prompts = 100 * step + number, number == prefill
                    assert run_step(exchange, rows[number], seed, rounded=self.rounded, prefill=prompts)
            except Exception as error:  # noqa: BLE001 - reported by the test's thread
                failures[number] = error
                barrier.abort()

        threads = [threading.Thread(target=work, args=(n,), daemon=True) for n in range(len(self.members))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(120)
        return failures

    @property
    def formed(self) -> int:
        """Groups in which the first member took part."""
        return self.members[0].exchange._lockstep.formed


def run_step(
    exchange: MeshExchange, rows: int, seed: int, between: Callable[[], None] = lambda: None, rounded: bool = False,
    prefill: bool = False,
) -> bool:  # fmt: skip
    """All layers of one step give the local bytes; False: experts did not answer.

    ``between``: called after each; ``rounded``: the local numbers to rounding will do.
    """
    exchange.begin(rows, prefill)
    try:
        for layer in LAYERS:
            hidden, x = random_rows(seed, rows), random_rows(seed + 50, rows)
            expected: Tensor = ToyLayer(layer).local(hidden, x)
            exchange.combine(exchange.dispatch(layer, hidden), x)
            if rounded:
                torch.testing.assert_close(x, expected, rtol=1e-5, atol=1e-5)
            else:
                assert x.numpy().tobytes() == expected.numpy().tobytes()
            between()
        return True
    except ExchangeUnavailable:
        exchange.abandon()
        return False
    finally:
        exchange.end()


def undisturbed(stats: ExchangeStats) -> bool:
    """No repeats and no frames thrown away, but for the few groups to which a thread of the test came too late."""
    return stats.repeats["group"] == stats.repeats.total() <= stats.exchanges // 4 and set(stats.dropped) <= {"late"}


@contextmanager
def group_mesh(
    attention: int, nodes: Sequence[str], phase: Phase | None = None, gate: Gate | None = None,
    network: MemoryNetwork | None = None, **options: Any,
) -> Iterator[GroupMesh]:  # fmt: skip
    """Every expert has a home on every instance; ``options`` go to the exchanges."""
    network = network or MemoryNetwork()
    with ExitStack() as stack:
        instances = [start_instance(network, stack, f"e{i}", 100 + i) for i in range(len(nodes))]
        placement = make_placement([list(range(len(nodes)))] * EXPERTS, [i.facts.id for i in instances])
        members = [_member(network, stack, number, phase, gate, options) for number in range(attention)]
        mesh = GroupMesh(network, members, instances, nodes, placement, rounded=options.get("partial", False))
        _introduce(mesh)
        for member in members:
            member.exchange.update(View(neighbours={m.name: m.neighbour for m in members}, node="a"))
        for number in range(attention):
            _update(mesh, number)
        yield mesh


def _update(mesh: GroupMesh, number: int) -> None:
    """The others answer pings meanwhile."""
    stop = threading.Event()
    others = [m.exchange for n, m in enumerate(mesh.members) if n != number]

    def answer(exchange: MeshExchange) -> None:
        while not stop.is_set():
            exchange.idle_wait(0.005)

    threads = [threading.Thread(target=answer, args=(other,), daemon=True) for other in others]
    for thread in threads:
        thread.start()
    mesh.members[number].exchange.update(mesh.view())
    stop.set()
    for thread in threads:
        thread.join(60)


def _introduce(mesh: GroupMesh) -> None:
    for instance, node in zip(mesh.instances, mesh.nodes, strict=True):
        others = {
            i.facts.id: ExpertNeighbour(i.facts.incarnation, i.facts.address)
            for i, other in zip(mesh.instances, mesh.nodes, strict=True)
            if other == node and i is not instance
        }
        instance.server.meet(others).result(60)
        instance.server.adopt([KnownPlacement.of(mesh.placement, instance.facts.id)]).result(60)


def _member(
    network: MemoryNetwork,
    stack: ExitStack,
    number: int,
    phase: Phase | None,
    gate: Gate | None,
    options: dict[str, Any],
) -> Member:
    transport = network.transport(max_frame_bytes=1 << 18, receive_slots=64)
    stack.callback(transport.close)
    settings: dict[str, Any] = {"deadline": 10.0, "give_up": 30.0, "pause": 0.002, "group_wait": 0.1} | options
    exchange = MeshExchange(
        transport, cast(Kernels, ToyKernels()), hidden=HIDDEN, dtype=torch.float32, top_k=TOP_K, mesh=MESH,
        incarnation=900 + number, max_rows=MAX_ROWS, gates={layer: ToyLayer(layer) for layer in LAYERS},
        ways=Ways(phase, gate), **settings,
    )  # fmt: skip
    return Member(exchange, f"a{number}", Neighbour(900 + number, transport.address))
