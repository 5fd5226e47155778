"""Makes an instance's server and store out of its settings: kernels, gates, data plane; compiles everything.

All of it happens in the compute thread, to which the data plane belongs from then on.
"""

import os
from contextlib import closing
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch

from services.experts.answers import Record, ServerLimits
from services.experts.compute import answer, answer_routed, plan_parts
from services.experts.server import ExpertServer
from services.experts.store import ExpertStore
from shared.activation import PARTS, Choice
from shared.compute import ComputeSide
from shared.config import ExpertsConfig
from shared.exchange_frames import Routes
from shared.keep_awake import KeepAwake
from shared.kernels.base import select_kernels
from shared.models.moe import MoeLayer
from shared.models.precision import choose_precision
from shared.models.spec import ModelSpec
from shared.pace import Pace
from shared.transport.base import Transport


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

    def run(self) -> None:
        """The compute thread's work until ``server.stop``."""
        with closing(self.transport), closing(self.awake), torch.inference_mode():
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
    server = ExpertServer(
        transport,
        layers,
        ServerLimits(spec.hidden, dtype, config.max_batched_tokens, spec.router.experts, spec.router.top_k),
        mesh=side.mesh,
        incarnation=side.instance.incarnation,
        record=record,
        pace=pace,
        awake=awake,
    )
    store = ExpertStore(
        layers,
        instance=side.instance.id,
        slots=config.slots,
        digest=checkpoint.digest,
        experts=spec.router.experts,
    )
    cores = tuple(sorted(os.sched_getaffinity(0))) if device.type == "cpu" else ()
    return Built(server, store, transport, pace, awake, cores)


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
        answer_routed(layer, x, routes, everywhere.homes, 0, *room, counts)
