"""Real expert processes over NATS and UCX: the bytes of a local computation, whatever happens to one of them."""

import asyncio
import os
import signal
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import AsyncExitStack
from typing import Any, TypeVar

import httpx
import numpy as np
import pytest
import torch
from torch import Tensor

from services.attention.mesh_exchange import MeshExchange
from services.attention.server import build_view
from shared.activation import mesh_hash
from shared.changes import Phase, PlacementRecord
from shared.cli.children import Child
from shared.config import MeshConfig
from shared.errors import ExchangeUnavailable
from shared.kernels.base import select_kernels
from shared.lifecycle import Instance
from shared.messages import AttentionFacts, ExpertFacts, Heartbeat, Kind, Placement, State, Subjects
from shared.models.loader import Checkpoint, open_checkpoint
from shared.models.moe import MoeLayer
from shared.models.presets import make_checkpoint
from shared.nats_server import NatsServer
from shared.transport.ucx import UcxTransport
from tests.integration.waiting import until

T = TypeVar("T")
CPU = torch.device("cpu")
START_LIMIT_S = 180.0


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    path = tmp_path_factory.mktemp("model") / "tiny"
    make_checkpoint("tiny-qwen3", path, seed=3)
    return open_checkpoint(str(path))


class Bench:
    """Control plane and attention side of a mesh whose experts are processes of their own."""

    def __init__(self, nats: NatsServer, mesh: str, checkpoint: Checkpoint, stack: AsyncExitStack) -> None:
        self.nats, self.mesh, self.checkpoint, self.spec = nats, mesh, checkpoint, checkpoint.spec
        self.children: dict[str, Child] = {}
        self.output: list[str] = []
        self.placement: Placement | None = None
        self._stack = stack
        self._compute = ThreadPoolExecutor(1, "compute")
        self.kernels = select_kernels(CPU, 1)
        self._layers: dict[int, MoeLayer] = {}

    async def start(self) -> None:
        """Announce an attention instance and a scheduler; make the exchange in the compute thread."""
        config = MeshConfig(nats=self.nats.url, mesh=self.mesh)
        self.scheduler = await self._enter(Instance(Kind.SCHEDULER, config, signals=False))
        self.attention = await self._enter(Instance(Kind.ATTENTION, config, signals=False))
        self.members = self.attention.members
        await self.scheduler.ready(lambda: {"placement": self._version, "serial": self._version})
        await self.attention.join(self.checkpoint.facts())
        facts = AttentionFacts(max_model_len=1, kv_blocks=1, block_size=1, max_num_seqs=1)
        await self.attention.ready(lambda: {"attention": facts.model_copy(update={"placement": self._version})})
        await self.compute(self._build)
        self._stack.callback(lambda: self._compute.submit(self.transport.close).result(60))

    async def _enter(self, instance: Instance) -> Instance:
        return await self._stack.enter_async_context(instance)

    def _build(self) -> None:
        self.transport = UcxTransport(1 << 20)
        self.exchange = MeshExchange(
            self.transport, self.kernels, hidden=self.spec.hidden, dtype=torch.float32,
            top_k=self.spec.router.top_k, mesh=mesh_hash(self.mesh, self.checkpoint.digest),
            incarnation=self.attention.incarnation, deadline=1.0, give_up=20.0,
        )  # fmt: skip
        for layer in self.spec.moe_layers:
            self._layers[layer] = MoeLayer(self.checkpoint, self.kernels, CPU, torch.float32, layer)
            self._layers[layer].load(range(self.spec.router.experts))

    async def compute(self, work: Callable[..., T], *arguments: Any) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._compute, work, *arguments)

    @property
    def _version(self) -> int:
        return self.placement.version if self.placement else 0

    async def spawn(self, name: str, **settings: str) -> Child:
        """An expert process; returns at once."""
        wanted = {"nats": self.nats.url, "mesh": self.mesh, "model": str(self.checkpoint.path), "id": name}
        wanted |= {"threads": "1"} | settings
        environ = dict(os.environ) | {f"MOEMESH_{k.upper()}": v for k, v in wanted.items()}
        argv = ["-m", "shared.cli.main", "serve", "experts"]
        child = Child(name, argv, environ, lambda name, line: self.output.append(f"{name}: {line}"))
        await child.start()
        self.children[name] = child
        self._stack.push_async_callback(child.stop, 30.0)
        return child

    def heartbeat(self, name: str) -> Heartbeat | None:
        member = self.members.get(name)
        return member.heartbeat if member else None

    def facts(self, name: str) -> ExpertFacts | None:
        heartbeat = self.heartbeat(name)
        return heartbeat.experts if heartbeat and heartbeat.state is State.READY else None

    async def until_ready(self, *names: str) -> None:
        def ready() -> bool:
            died = [c for c in self.children.values() if c.process and c.process.returncode is not None]
            assert not died, "\n".join(self.output)
            return all(self.facts(name) for name in names)

        await until(ready, "ready experts", START_LIMIT_S)

    async def place(self, homes: Callable[[int], list[int]], names: list[str]) -> None:
        """Store the next placement (``homes(e)``: instances of expert e) beside the last one, and announce it."""
        before = self.placement
        masks = [sum(1 << i for i in homes(e)) for e in range(self.spec.router.experts)]
        self.placement = Placement(
            version=self._version + 1, epoch=1, author="test", reason="test", digest=self.checkpoint.digest,
            instances=tuple(names), moe_layers=self.spec.moe_layers, experts=len(masks),
            homes=np.array([masks] * len(self.spec.moe_layers), "<u8").tobytes(),
        )  # fmt: skip
        record = PlacementRecord(
            epoch=1, serial=self._version, newest=self._version, phase=Phase.COMMIT,
            committed=self.placement, other=before,
        )  # fmt: skip
        store = await self.scheduler.bus.store(self.scheduler.subjects.bucket)
        found = await store.get(Subjects.PLACEMENT_KEY)
        if found:
            await store.update(Subjects.PLACEMENT_KEY, record.encode(), found[1])
        else:
            await store.create(Subjects.PLACEMENT_KEY, record.encode())
        await self.scheduler.announce()

    async def until_loaded(self, *names: str) -> None:
        def loaded() -> bool:
            return all((facts := self.facts(n)) and facts.placement == self._version for n in names)

        await until(loaded, f"placement {self._version} on {names}")

    async def look(self) -> None:
        """Give the exchange the present view."""
        await self.compute(self.exchange.update, build_view(self.placement, self.members, self.checkpoint.digest))

    async def check(self, rows: int = 5) -> None:
        """One exchange per layer gives the local bytes."""
        await self.compute(self._check, rows)

    def _check(self, rows: int) -> None:
        self.exchange.begin(rows)
        for layer in self.spec.moe_layers:
            hidden, x = torch.randn(rows, self.spec.hidden), torch.randn(rows, self.spec.hidden)
            expected = self._local(layer, hidden, x.clone())
            self.exchange.combine(self.exchange.dispatch(layer, hidden), x)
            assert x.numpy().tobytes() == expected.numpy().tobytes()
        self.exchange.end()

    def _local(self, layer: int, hidden: Tensor, x: Tensor) -> Tensor:
        """All experts in this process, one row after the other."""
        for t in range(len(hidden)):
            weights, ids = self._layers[layer].gate(hidden[t : t + 1])
            order = ids[0].argsort()
            ids, weights = ids[0][order], weights[0][order]
            out = torch.empty(len(ids), hidden.shape[1])
            self._layers[layer].forward(hidden[t : t + 1], torch.zeros_like(ids), ids, weights, out)
            index = torch.arange(len(ids), dtype=torch.int32)[None]
            self.kernels.combine(x[t : t + 1], [out], torch.zeros_like(index), index, weights[None])
        return x


@pytest.fixture
async def bench(nats_server: NatsServer, mesh: str, checkpoint: Checkpoint) -> AsyncIterator[Bench]:
    torch.manual_seed(1)
    async with AsyncExitStack() as stack:
        made = Bench(nats_server, mesh, checkpoint, stack)
        await made.start()
        yield made


def everywhere(count: int) -> Callable[[int], list[int]]:
    return lambda expert: list(range(count))


def round_robin(count: int) -> Callable[[int], list[int]]:
    return lambda expert: [expert % count]


async def test_processes_give_the_local_bytes_through_switches_kills_and_drains(bench: Bench):
    """The life of a small pool: sole homes, a switch to replicated ones, a kill -9, a restart, a drain."""
    for name in ("e0", "e1"):
        await bench.spawn(name)
    await bench.until_ready("e0", "e1")
    await bench.place(round_robin(2), ["e0", "e1"])
    await bench.until_loaded("e0", "e1")
    await bench.look()
    for rows in (1, 2, 33):
        await bench.check(rows)
    assert not bench.exchange.stats().repeats
    assert bench.exchange.stats().express

    await bench.place(everywhere(2), ["e0", "e1"])
    await bench.until_loaded("e0", "e1")
    await bench.check()  # the old version is answered until attention switches
    await bench.look()
    for _ in range(3):
        await bench.check(rows=33)
    assert not bench.exchange.stats().repeats
    await check_metrics(bench)

    process = bench.children["e1"].process
    assert process is not None
    process.kill()
    await process.wait()
    await bench.check()
    assert bench.exchange.stats().suspected == {"e1": 1}
    await bench.check()

    await respawn(bench, "e1")
    await bench.until_loaded("e1")
    await bench.look()
    await bench.check()
    await bench.place(round_robin(1), ["e1"])
    await bench.until_loaded("e1")
    await bench.look()
    await stops(bench, "e0")
    await bench.check()
    assert bench.exchange.stats().unavailable == 0


async def respawn(bench: Bench, name: str) -> None:
    """Start again under a name whose last heartbeats may still be remembered."""
    await until(lambda: bench.heartbeat(name) is None, f"{name} forgotten", 60.0)
    await bench.spawn(name)


async def check_metrics(bench: Bench) -> None:
    heartbeat = bench.heartbeat("e0")
    assert heartbeat is not None
    async with httpx.AsyncClient() as client:
        text = (await client.get(heartbeat.url + "/metrics")).text
    replicas = len(bench.spec.moe_layers) * bench.spec.router.experts
    assert f"moemesh_replicas {replicas:.1f}" in text
    assert "moemesh_placement_version 2.0" in text
    assert "moemesh_expert_tokens_total{" in text

    def express() -> float:  # counted when compiled code returns, a moment after it has answered
        lines = httpx.get(heartbeat.url + "/metrics", timeout=30).text.splitlines()
        return float(dict(line.rsplit(" ", 1) for line in lines if line[0] != "#")["moemesh_answers_express_total"])

    await until(express, "frames answered by compiled code, though replies are long")


async def stops(bench: Bench, name: str) -> None:
    """SIGTERM ends the process with status 0."""
    process = bench.children[name].process
    assert process is not None
    process.send_signal(signal.SIGTERM)
    assert await asyncio.wait_for(process.wait(), 60) == 0, "\n".join(bench.output)


async def test_a_draining_instance_answers_until_nobody_counts_on_it(bench: Bench):
    """With sole homes it goes on until the placement leaves it out or frames stop coming."""
    child = await bench.spawn("e0")
    await bench.until_ready("e0")
    await bench.place(everywhere(1), ["e0"])
    await bench.until_loaded("e0")
    await bench.look()
    await bench.check()
    assert child.process is not None
    child.process.send_signal(signal.SIGTERM)
    await until(lambda: (h := bench.heartbeat("e0")) and h.state is State.DRAINING, "draining")
    await bench.look()
    await bench.check()
    assert await asyncio.wait_for(child.process.wait(), 60) == 0, "\n".join(bench.output)
    await bench.look()
    with pytest.raises(ExchangeUnavailable, match="no home to ask"):
        await bench.check()


async def test_more_homes_than_slots_are_refused_where_a_person_looks(bench: Bench):
    """The instance stays READY without the placement, says why, and takes the next one that fits."""
    needed = len(bench.spec.moe_layers) * bench.spec.router.experts
    await bench.spawn("e0", slots=str(needed - 1))
    await bench.until_ready("e0")
    await bench.place(everywhere(1), ["e0"])
    await until(lambda: (h := bench.heartbeat("e0")) and f"{needed} replicas" in h.detail, "the refusal")
    facts = bench.facts("e0")
    assert facts is not None
    assert (facts.placement, facts.replicas) == (0, 0)
    await bench.place(round_robin(2), ["e0", "e9"])
    await bench.until_loaded("e0")
    heartbeat = bench.heartbeat("e0")
    assert heartbeat is not None
    assert heartbeat.detail == ""


async def test_what_cannot_start_says_why_and_exits_with_status_1(bench: Bench):
    """All of them at the same time: it is the start that takes long."""
    last_words = {
        ("slots", "-1"): "--slots: -1 is below 0",
        ("max_batched_tokens", "0"): "--max-batched-tokens: 0 is less than 1",
        ("model", "/nowhere/model"): "/nowhere/model",
        ("device", "cuda:9"): "cuda:9",
        ("ucx_tls", "nonsense"): "nonsense",
    }
    children = [await bench.spawn(f"e{i}", **dict([setting])) for i, setting in enumerate(last_words)]
    for child, words in zip(children, last_words.values(), strict=True):
        assert await asyncio.wait_for(child.wait(), START_LIMIT_S) == 1, words
        assert words in "\n".join(child.lines)
