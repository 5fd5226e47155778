"""A mesh in one process with real models, engines, exchanges and expert servers over the in-process transport.

Everything but NATS and the transport is what the services run; the transport can harm every frame.
"""

import threading
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch

from services.attention.batching import Batcher, Limits
from services.attention.engine import Engine
from services.attention.exchange import Exchange, ExpertInstance, View
from services.attention.kv_cache import BlockPool
from services.attention.local_exchange import LocalExchange
from services.attention.mesh_exchange import MeshExchange
from services.attention.micro_batches import MicroBatching
from services.attention.step import ModelRunner
from services.experts.answers import KnownPlacement, ServerLimits
from services.experts.server import ExpertServer
from shared.kernels.cpu import CpuKernels
from shared.messages import Placement
from shared.models.decoder import Decoder
from shared.models.loader import Checkpoint, open_checkpoint
from shared.models.local import LocalExperts
from shared.models.moe import MoeLayer
from shared.models.precision import choose_precision
from shared.request_messages import SamplingParams, Submit, TokenDelta
from shared.transport.faults import Faults
from shared.transport.memory import MemoryNetwork

MESH_HASH = 0x0123456789ABCDEF
CPU = torch.device("cpu")
MAX_TURNS = 20_000


@dataclass(frozen=True)
class Shape:
    """How a mesh is built; the output must not depend on any of it."""

    attention: int = 1
    experts: int = 1
    """0: the attention instances are monoliths."""
    homes: int = 1
    """Homes per expert; at most ``experts``."""
    batched_tokens: int = 512
    kv_blocks: int = 256
    block_size: int = 16
    micro_batches: int = 1


@dataclass
class Output:
    """Everything a request gave: token ids and the bits of their log-probabilities."""

    tokens: list[int] = field(default_factory=list)
    logprobs: list[tuple[object, ...]] = field(default_factory=list)
    finish: str = ""

    def take(self, delta: TokenDelta) -> None:
        assert delta.error is None, delta.error
        assert delta.position == len(self.tokens)
        self.tokens += delta.tokens
        self.logprobs += [(entry.logprob, entry.rank, entry.top) for entry in delta.logprobs]
        self.finish = delta.finish or ""


class Parts:
    """The model of one checkpoint, loaded once: a decoder and up to three sets of expert layers."""

    def __init__(self, path: Path) -> None:
        self.checkpoint: Checkpoint = open_checkpoint(str(path))
        self.spec = self.checkpoint.spec
        self.precise = choose_precision("auto", CPU, self.checkpoint).precise
        self.kernels = CpuKernels(threads=1, precise=self.precise)
        self.kernels.compile()
        self.decoder = Decoder(self.checkpoint, self.kernels, CPU, torch.float32, 2048)
        self.experts = [self._layers() for _ in range(3)]
        self.local = LocalExperts(self.checkpoint, self.kernels, CPU, torch.float32)

    def _layers(self) -> dict[int, MoeLayer]:
        kernels = CpuKernels(threads=1, precise=self.precise)
        layers = {i: MoeLayer(self.checkpoint, kernels, CPU, torch.float32, i) for i in self.spec.moe_layers}
        for layer in layers.values():
            layer.load(range(self.spec.router.experts))
        return layers

    def placement(self, shape: Shape) -> Placement:
        experts = self.spec.router.experts
        masks = [sum(1 << ((e + j) % shape.experts) for j in range(shape.homes)) for e in range(experts)]
        return Placement(
            version=1, epoch=1, author="test", reason="test", digest=self.checkpoint.digest,
            instances=tuple(f"e{i}" for i in range(shape.experts)), moe_layers=self.spec.moe_layers, experts=experts,
            homes=np.array([masks] * len(self.spec.moe_layers), "<u8").tobytes(),
        )  # fmt: skip


@dataclass
class ExactMesh:
    """Engines that are driven by hand, and expert servers in threads."""

    engines: list[Engine]
    outputs: dict[str, Output]
    pools: list[BlockPool]

    def run(self, requests: Mapping[str, Submit], arrivals: Mapping[str, int]) -> dict[str, Output]:
        """Submit every request before turn ``arrivals[id]``, engines in rotation; returns when all have finished."""
        for turn in range(MAX_TURNS):
            for index, (name, request) in enumerate(requests.items()):
                if arrivals[name] == turn:
                    decision = self.engines[index % len(self.engines)].submit(request)
                    assert decision.ok, decision
            for engine in self.engines:
                engine.turn()
            if turn >= max(arrivals.values()) and all(
                name in self.outputs and self.outputs[name].finish for name in requests
            ):
                break
        assert all(not pool.leaked() for pool in self.pools)
        return {name: self.outputs[name] for name in requests}


@contextmanager
def exact_mesh(parts: Parts, shape: Shape, faults: Faults | None = None) -> Iterator[ExactMesh]:
    """Build a mesh of ``shape``; its threads end with the context."""
    network = MemoryNetwork(faults)
    placement = parts.placement(shape)
    with ExitStack() as stack:
        instances = [start_experts(parts, network, stack, placement, i) for i in range(shape.experts)]
        view = View(placement, {instance.id: instance for instance in instances})
        mesh = ExactMesh([], {}, [])
        for index in range(shape.attention):
            engine, pool = make_engine(parts, network, shape, mesh, 900 + index)
            engine.update(view)
            engine.turn()
            mesh.engines.append(engine)
            mesh.pools.append(pool)
        yield mesh


def start_experts(
    parts: Parts, network: MemoryNetwork, stack: ExitStack, placement: Placement, index: int
) -> ExpertInstance:
    """One expert server on a thread of its own."""
    transport = network.transport(max_frame_bytes=4 << 20)
    limits = ServerLimits(parts.spec.hidden, torch.float32, 512, parts.spec.router.experts, parts.spec.router.top_k)
    server = ExpertServer(transport, parts.experts[index], limits, mesh=MESH_HASH, incarnation=100 + index)
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()

    def stop() -> None:
        server.stop()
        thread.join(10)
        assert not thread.is_alive()
        transport.close()

    stack.callback(stop)
    server.adopt([KnownPlacement.of(placement, f"e{index}")]).result(10)
    return ExpertInstance(f"e{index}", 100 + index, transport.address, 0.0)


def make_exchange(parts: Parts, network: MemoryNetwork, incarnation: int) -> Exchange:
    return MeshExchange(
        network.transport(max_frame_bytes=4 << 20), parts.kernels, hidden=parts.spec.hidden, dtype=torch.float32,
        top_k=parts.spec.router.top_k, mesh=MESH_HASH, incarnation=incarnation, deadline=0.02, give_up=20.0,
        pause=0.002,
    )  # fmt: skip


def make_engine(
    parts: Parts, network: MemoryNetwork, shape: Shape, mesh: ExactMesh, incarnation: int
) -> tuple[Engine, BlockPool]:
    """One attention instance without NATS; its deltas go to ``mesh.outputs``."""
    exchange = make_exchange(parts, network, incarnation) if shape.experts else LocalExchange(parts.local)
    limits = Limits(
        max_model_len=1024, max_num_seqs=min(8, shape.batched_tokens), max_batched_tokens=shape.batched_tokens,
        max_waiting=64, vocab_size=parts.spec.vocab_size, kv_blocks=shape.kv_blocks, block_size=shape.block_size,
    )  # fmt: skip
    pool = BlockPool(shape.kv_blocks, shape.block_size)
    cache = parts.decoder.new_cache(shape.kv_blocks, shape.block_size)
    micro_batching = MicroBatching(shape.micro_batches)
    runner = ModelRunner(parts.decoder, cache, exchange, shape.block_size, micro_batching=micro_batching)

    def emit(gateway: str, deltas: list[TokenDelta]) -> None:
        for delta in deltas:
            mesh.outputs.setdefault(delta.request_id, Output()).take(delta)

    return Engine(runner, exchange, Batcher(limits, pool), emit, no_home_deadline=60.0), pool


def request(name: str, prompt: list[int], sampling: SamplingParams) -> Submit:
    return Submit(
        request_id=name, gateway="g", prompt=np.array(prompt, "<i4").tobytes(), sampling=sampling, deadline_s=600
    )
