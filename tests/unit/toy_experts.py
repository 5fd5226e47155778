"""A toy MoE layer and toy kernels for exchange tests: every output row has its own fixed order of operations."""

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import cache
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from services.attention.exchange import ExpertInstance, View
from services.attention.mesh_exchange import MeshExchange
from services.attention.replies import Arrangement
from services.experts.answers import KnownPlacement, ServerLimits
from services.experts.compute import plan_parts
from services.experts.elastic import Elastic
from services.experts.server import ExpertServer
from shared.activation import PARTS, Choice, write_parts
from shared.kernels.base import Kernels
from shared.messages import Placement
from shared.transport.memory import MemoryNetwork, MemoryTransport

HIDDEN, EXPERTS, TOP_K, MAX_ROWS = 8, 6, 3, 64
LAYERS = (1, 3)
MESH = 0xABCDEF0123456789
LIMITS = ServerLimits(HIDDEN, torch.float32, MAX_ROWS, EXPERTS, TOP_K)


class ToyLayer:
    """Gate and experts of one layer, from a seed; counts forward passes."""

    weighs_input = False

    def __init__(self, layer: int, top_k: int = TOP_K) -> None:
        rng = np.random.default_rng(layer)
        self._router = rng.standard_normal((EXPERTS, HIDDEN)).astype(np.float32)
        self._scale = rng.standard_normal((EXPERTS, HIDDEN)).astype(np.float32)
        self._shift = rng.standard_normal((EXPERTS, HIDDEN)).astype(np.float32)
        self._top_k = top_k
        self.forwards = 0

    def gate(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        scores = np.stack([(self._router * row).sum(axis=1) for row in rows.numpy()])
        ids = np.argsort(-scores, axis=1, kind="stable")[:, : self._top_k].astype(np.int32)
        weights = np.take_along_axis(np.exp(scores), ids.astype(np.int64), axis=1)
        weights /= weights.sum(axis=1, keepdims=True)
        return torch.from_numpy(weights.astype(np.float32)), torch.from_numpy(ids)

    def answering(self, rows: Tensor) -> None:
        """Its kernels have no such call."""

    def expert(self, expert: int, row: np.ndarray) -> np.ndarray:
        return np.tanh(row * self._scale[expert] + self._shift[expert]).astype(np.float32)

    def forward(self, rows: Tensor, tokens: Tensor, ids: Tensor, weights: Tensor, out: Tensor) -> None:
        assert torch.equal(ids, ids.sort().values), "parts must be in ascending order of experts"
        self.forwards += 1
        for p, (token, expert) in enumerate(zip(tokens.tolist(), ids.tolist(), strict=True)):
            out[p] = torch.from_numpy(self.expert(expert, rows[token].numpy()))

    def local(self, rows: Tensor, x: Tensor) -> Tensor:
        """What a mesh must make of x: plus the sum of experts, ascending, one fp32 addition after the other."""
        weights, ids = (t.numpy() for t in self.gate(rows))
        result = x.clone().numpy()
        for t, row in enumerate(rows.numpy()):
            total = np.zeros_like(row)
            for j in np.argsort(ids[t], kind="stable"):
                total += weights[t, j] * self.expert(ids[t, j], row)
            result[t] += total
        return torch.from_numpy(result)


class ToyKernels:
    def gather(self, *arguments: Any) -> None:
        """Parts are combined step by step."""

    def combine(self, out: Tensor, rows: Sequence[Tensor], source: Tensor, index: Tensor, weights: Tensor) -> None:
        for t in range(len(out)):
            total = torch.zeros_like(out[t])
            for j in range(source.shape[1]):
                total += weights[t, j] * rows[int(source[t, j])][int(index[t, j])]
            out[t] += total


def make_placement(
    homes: Sequence[Sequence[int]], ids: Sequence[str], version: int = 1, layers: Sequence[int] = LAYERS
) -> Placement:
    """``homes[e]``: instance indices of expert e, the same in every layer."""
    masks = np.array([[sum(1 << i for i in hosts) for hosts in homes]] * len(layers), "<u8")
    return Placement(
        version=version, epoch=7, author="test", reason="test", digest="d" * 64, instances=tuple(ids),
        moe_layers=tuple(layers), experts=len(homes), homes=masks.tobytes(),
    )  # fmt: skip


def everywhere(instances: int) -> list[list[int]]:
    return [list(range(instances)) for _ in range(EXPERTS)]


def round_robin(instances: int) -> list[list[int]]:
    return [[e % instances] for e in range(EXPERTS)]


@dataclass
class ToyInstance:
    """One expert server in a thread."""

    server: ExpertServer
    transport: MemoryTransport
    facts: ExpertInstance
    layers: dict[int, ToyLayer]


@dataclass
class ToyMesh:
    """Expert servers in threads and one attention side, over an in-process network."""

    network: MemoryNetwork
    placement: Placement
    instances: list[ToyInstance]
    exchange: MeshExchange
    attention: MemoryTransport
    layers: dict[int, ToyLayer] = field(default_factory=lambda: {layer: ToyLayer(layer) for layer in LAYERS})

    def view(self, seen: float = 0.0, placement: Placement | None = None) -> View:
        """All instances, with heartbeats at ``seen``."""
        facts = [ExpertInstance(f.id, f.incarnation, f.address, seen) for f in (i.facts for i in self.instances)]
        return View(placement or self.placement, {f.id: f for f in facts})

    def adopt(self, *placements: Placement, only: Sequence[int] = ()) -> None:
        for index, instance in enumerate(self.instances):
            if not only or index in only:
                known = [KnownPlacement.of(p, instance.facts.id) for p in placements]
                instance.server.adopt(known).result(60)

    def run(self, layer: int, rows: Tensor, x: Tensor) -> Tensor:
        """One exchange; returns x plus the experts, x is left alone."""
        out = x.clone()
        self.exchange.combine(self.exchange.dispatch(layer, rows), out)
        return out

    def check(self, seed: int, layer: int = LAYERS[0], rows: int = 5) -> None:
        """One exchange of random rows gives the local bytes."""
        hidden, x = random_rows(seed, rows), random_rows(seed + 1, rows)
        expected = self.layers[layer].local(hidden, x)
        assert self.run(layer, hidden, x).numpy().tobytes() == expected.numpy().tobytes()


def random_rows(seed: int, rows: int) -> Tensor:
    return torch.from_numpy(np.random.default_rng(seed).standard_normal((rows, HIDDEN)).astype(np.float32))


@cache
def compile_exchange() -> None:
    """Compile what an exchange runs, so that no deadline of a test meets the compiler."""
    homes = np.ones(EXPERTS, np.uint64)
    plan = plan_parts(ToyLayer(LAYERS[0]), random_rows(0, 1), Choice(homes, 1, 0))
    meta = np.empty(TOP_K * PARTS.itemsize, np.uint8)
    write_parts(meta, plan.parts.tokens, plan.parts.experts, plan.weights)
    Arrangement(TOP_K).fill(1, [(0, meta)], homes)


MakeElastic = Callable[[MemoryTransport], tuple[Mapping[int, "ToyLayer"], Elastic]]
"""The layers of an instance whose experts come and go, and who sees to that."""


def start_instance(
    network: MemoryNetwork, stack: ExitStack, name: str, incarnation: int, make_elastic: MakeElastic | None = None
) -> ToyInstance:
    """An expert server in a thread of its own that stops with ``stack``."""
    transport = network.transport(max_frame_bytes=1 << 16)
    layers, elastic = {layer: ToyLayer(layer) for layer in LAYERS}, None
    if make_elastic:
        made, elastic = make_elastic(transport)
        layers = dict(made)
        stack.callback(elastic.close)
    compile_exchange()
    server = ExpertServer(transport, layers, LIMITS, mesh=MESH, incarnation=incarnation, elastic=elastic)
    thread = threading.Thread(target=server.run, name=name, daemon=True)
    thread.start()

    def stop() -> None:
        server.stop()
        thread.join(60)
        assert not thread.is_alive()
        transport.close()

    stack.callback(stop)
    return ToyInstance(server, transport, ExpertInstance(name, incarnation, transport.address, 0.0), layers)


def make_exchange(transport: MemoryTransport, **options: Any) -> MeshExchange:
    settings: dict[str, Any] = {"deadline": 0.05, "give_up": 10.0, "pause": 0.002} | options
    return MeshExchange(
        transport, cast(Kernels, ToyKernels()), hidden=HIDDEN, dtype=torch.float32, top_k=TOP_K, mesh=MESH,
        incarnation=900, **settings,
    )  # fmt: skip


@contextmanager
def toy_mesh(
    homes: Sequence[Sequence[int]],
    network: MemoryNetwork | None = None,
    make_elastic: MakeElastic | None = None,
    **options: Any,
) -> Iterator[ToyMesh]:
    """A mesh with as many expert instances as ``homes`` names; ``options`` go to the exchange."""
    network = network or MemoryNetwork()
    count = 1 + max(max(hosts) for hosts in homes)
    with ExitStack() as stack:
        attention = network.transport(max_frame_bytes=1 << 16)
        stack.callback(attention.close)
        instances = [start_instance(network, stack, f"e{i}", 100 + i, make_elastic) for i in range(count)]
        placement = make_placement(homes, [i.facts.id for i in instances])
        mesh = ToyMesh(network, placement, instances, make_exchange(attention, **options), attention)
        mesh.adopt(placement)
        mesh.exchange.update(mesh.view())
        yield mesh
