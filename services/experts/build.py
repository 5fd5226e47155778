"""Makes an instance's server and store out of its settings: kernels, gates, data plane; compiles everything.

All of it happens in the compute thread, to which the data plane belongs from then on.
"""

import os
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch

from services.experts.answers import Record, ServerLimits
from services.experts.compute import answer, carry_out, plan_parts, plan_routed
from services.experts.elastic import Elastic
from services.experts.elastic_store import ElasticStore
from services.experts.server import ExpertServer
from services.experts.starts import Starts
from services.experts.store import ExpertStore
from shared.activation import PARTS, Choice
from shared.compute import ComputeSide
from shared.config import ExpertsConfig, parse_bytes
from shared.elastic.eviction import Eviction
from shared.elastic.keep_alive import Fixed, Histogram, KeepAlive, Window
from shared.elastic.residency import Residency
from shared.errors import ConfigError
from shared.exchange_frames import Routes
from shared.keep_awake import KeepAwake
from shared.kernels.base import select_kernels
from shared.kernels.weights import Weight
from shared.models.loader import Checkpoint
from shared.models.moe import MoeLayer, expert_weights
from shared.models.precision import choose_precision
from shared.models.slots import DeviceSlots, HostSlots, tensors_of
from shared.models.spec import ModelSpec
from shared.pace import Pace
from shared.predictors.base import Predictor
from shared.predictors.files import load_predictors
from shared.transport.base import Transport

SHORT_IDLE_S = 10.0
"""By its histogram an expert may be idle for much less, between two steps; it is not stopped for that."""


@dataclass
class Built:
    """Everything the main thread needs to know."""

    server: ExpertServer
    store: ExpertStore
    transport: Transport
    pace: Pace
    awake: KeepAwake
    cores: tuple[int, ...]
    """Of the compute thread, on a CPU."""
    elastic: Elastic | None

    def run(self) -> None:
        """The compute thread's work until ``server.stop``."""
        with ExitStack() as stack, torch.inference_mode():
            for part in (self.transport, self.awake, self.elastic):
                stack.callback(part.close) if part else None
            self.server.run()


def build(config: ExpertsConfig, side: ComputeSide, record: Record) -> Built:
    """Raises ModelError and TransportError."""
    checkpoint, device, spec = side.checkpoint, side.device, side.checkpoint.spec
    precision = choose_precision(config.dtype, device, checkpoint)
    dtype, kernels = precision.tensors, select_kernels(device, side.threads, precision.precise)
    side.say("loading gates")
    make = partial(MoeLayer, checkpoint, kernels, device, dtype)
    layers = {index: make(index) for index in spec.moe_layers}
    side.say("compiling kernels")
    with torch.inference_mode():
        warm_up(make(spec.moe_layers[0]), spec, device, dtype)
    transport, pace = side.data_plane(config.max_batched_tokens, config.ucx_tls)
    awake = side.keep_awake()
    elastic = make_elastic(config, side, layers, dtype, transport.wake) if is_elastic(config) else None
    server = ExpertServer(
        transport,
        layers,
        ServerLimits(spec.hidden, dtype, config.max_batched_tokens, spec.router.experts, spec.router.top_k),
        mesh=side.mesh,
        incarnation=side.instance.incarnation,
        record=record,
        pace=pace,
        awake=awake,
        elastic=elastic,
    )
    facts = {"instance": side.instance.id, "digest": checkpoint.digest, "experts": spec.router.experts}
    if elastic:
        store: ExpertStore = ElasticStore(layers, elastic, server.house, **facts)
    else:
        store = ExpertStore(layers, slots=config.slots, **facts)
    cores = tuple(sorted(os.sched_getaffinity(0))) if device.type == "cpu" else ()
    return Built(server, store, transport, pace, awake, cores, elastic)


def is_elastic(config: ExpertsConfig) -> bool:
    """Whether experts come and go, or at least lie in memory of this instance's own."""
    return bool(config.expert_memory) or config.expert_store == "private"


def make_elastic(
    config: ExpertsConfig,
    side: ComputeSide,
    layers: Mapping[int, MoeLayer],
    dtype: torch.dtype,
    wake: Callable[[], None],
) -> Elastic:
    """Raises ConfigError for a budget that is too small, ModelError for predictors of another model."""
    checkpoint, device, spec = side.checkpoint, side.device, side.checkpoint.spec
    like = expert_weights(checkpoint, spec.moe_layers[0], 0, device, dtype)
    count = slot_count(config.expert_memory, spec, sum(tensor.nbytes for tensor in tensors_of(like)))
    slots = HostSlots(count, like) if device.type == "cpu" else DeviceSlots(count, device, dtype)

    def read(opened: Checkpoint, layer: int, expert: int) -> tuple[Weight, ...]:
        return expert_weights(opened, layer, expert, torch.device("cpu"), dtype)

    every = [(layer, expert) for layer in spec.moe_layers for expert in range(spec.router.experts)]
    starts = Starts(partial(Checkpoint, checkpoint.source), read, slots, wake, every)
    residency = Residency(len(layers), spec.router.experts, count, config.eviction)
    ahead = range(1, config.predict_ahead + 1)
    predictor = find_predictor(config, checkpoint)
    keep_alive = make_keep_alive(config, len(layers), spec.router.experts)
    size = sum(tensor.nbytes for tensor in tensors_of(like))
    return Elastic(layers, residency, starts, slots, predictor, ahead, keep_alive=keep_alive, slot_bytes=size)


def make_keep_alive(config: ExpertsConfig, layers: int, experts: int) -> KeepAlive | None:
    """The policy of ``--keep-alive-policy``; None when experts stay."""
    if not config.keep_alive:
        return None
    if config.keep_alive_policy == "window":
        return Window(layers, experts, config.keep_alive)
    if config.keep_alive_policy == "histogram":
        return Histogram(layers, experts, config.keep_alive, worth_s=SHORT_IDLE_S)
    return Fixed(layers, experts, config.keep_alive)


def find_predictor(config: ExpertsConfig, checkpoint: Checkpoint) -> Predictor | None:
    """What foresees loads, if anything does. Raises BadPredictors."""
    beside = checkpoint.path / "predictors"
    if config.predictor == "none" or config.eviction is Eviction.LRU or not (config.predictor or beside.is_dir()):
        return None
    return load_predictors(Path(config.predictor or beside), checkpoint.digest)[1]


def slot_count(memory: str, spec: ModelSpec, expert_bytes: int) -> int:
    """How many experts the budget holds; all of the model's at most. Raises ConfigError when one row needs more."""
    every, row = len(spec.moe_layers) * spec.router.experts, spec.router.top_k
    if not memory:
        return every
    name = "--expert-memory"
    count = parse_bytes(name, memory) // expert_bytes
    if count < row:
        raise ConfigError(
            name,
            f"{memory} holds {count} experts of {expert_bytes} bytes; a row needs {row}: at least {row * expert_bytes}",
        )
    return min(count, every)


def warm_up(layer: MoeLayer, spec: ModelSpec, device: torch.device, dtype: torch.dtype) -> None:
    """Compile every kernel of an exchange, or load it from the cache on disk; ``layer`` is a spare one."""
    everywhere = Choice(np.ones(spec.router.experts, np.uint64), live=1, instance=0)
    for rows in (1, 8):
        x = torch.ones(rows, spec.hidden, device=device, dtype=dtype)
        plan = plan_parts(layer, x, everywhere)
        layer.load(set(plan.parts.experts.tolist()))  # these only: an expert may have to be unpacked or copied
        parts = len(plan.weights)
        room = np.empty(parts * PARTS.itemsize, np.uint8), torch.empty(parts, spec.hidden, device=device)
        counts = np.zeros((2, spec.router.experts), np.int64)
        answer(layer, x, everywhere, *room, counts)
        weights, ids = (tensor.numpy(force=True).copy() for tensor in layer.gate(x))
        routes = Routes(np.arange(rows, dtype=np.int32), ids, np.zeros_like(ids), weights)
        carry_out(plan_routed(layer, routes, everywhere.homes, 0, 0), layer, x, *room, counts)
