"""Makes an instance's engine out of its settings: kernels, weights, cache, data plane; compiles everything.

All of it happens in the compute thread, to which the data plane and the tensors belong from then on.
"""

from contextlib import closing
from dataclasses import dataclass

import numpy as np
import torch

from services.attention import sampler
from services.attention.batching import Batcher, Limits
from services.attention.engine import Emit, Engine
from services.attention.kv_cache import BlockPool
from services.attention.mesh_exchange import MeshExchange
from services.attention.micro_batches import MicroBatching
from services.attention.replies import Arrangement
from services.attention.sizing import context_length, plan_limits
from services.attention.step import ModelRunner
from shared.activation import PARTS
from shared.compute import ComputeSide
from shared.config import AttentionConfig
from shared.kernels.base import Kernels, select_kernels
from shared.models.decoder import Decoder
from shared.models.precision import choose_precision
from shared.transport.base import Transport


@dataclass
class Built:
    """Everything the main thread needs to know."""

    engine: Engine
    exchange: MeshExchange
    transport: Transport
    limits: Limits

    def run(self) -> None:
        """The compute thread's work until ``engine.stop``."""
        with closing(self.transport):
            self.engine.run()


def build(config: AttentionConfig, side: ComputeSide, emit: Emit) -> Built:
    """Raises ConfigError, ModelError and TransportError."""
    checkpoint, device, spec = side.checkpoint, side.device, side.checkpoint.spec
    precision = choose_precision(config.dtype, device, checkpoint)
    dtype, kernels = precision.tensors, select_kernels(device, side.threads, precision.precise)
    side.say("mapping weights" if device.type == "cpu" else f"loading weights to {device}")
    decoder = Decoder(checkpoint, kernels, device, dtype, context_length(config, spec))
    limits = plan_limits(config, spec, decoder.bytes_per_block(config.block_size))
    side.say(f"KV cache of {limits.kv_blocks * limits.block_size} tokens")
    cache = decoder.new_cache(limits.kv_blocks, limits.block_size)
    transport = side.transport(limits.max_batched_tokens, config.ucx_tls)
    exchange = MeshExchange(
        transport, kernels, hidden=spec.hidden, dtype=dtype, top_k=spec.router.top_k,
        mesh=side.mesh, incarnation=side.instance.incarnation, deadline=config.exchange_deadline,
    )  # fmt: skip
    micro_batching = MicroBatching(config.micro_batches)
    runner = ModelRunner(decoder, cache, exchange, limits.block_size, config.trace_layers, micro_batching)
    side.say("compiling kernels")
    with torch.inference_mode():
        warm_up(runner, kernels, spec.router.top_k)
    batcher = Batcher(limits, BlockPool(limits.kv_blocks, limits.block_size, config.prefix_cache))
    engine = Engine(runner, exchange, batcher, emit, config.no_home_deadline, record=side.instance.telemetry.record)
    return Built(engine, exchange, transport, limits)


def warm_up(runner: ModelRunner, kernels: Kernels, top_k: int) -> None:
    """Compile every kernel of a step, or load it from the cache on disk."""
    x = runner.warm_up()
    arrangement = Arrangement(top_k)
    parts = np.zeros(top_k, PARTS)
    parts["expert"] = np.arange(top_k)
    arrangement.fill(1, [(0, parts.view(np.uint8))], np.ones(top_k, np.uint64))
    kernels.combine(x, [torch.zeros(top_k, x.shape[1], device=x.device)], *arrangement.tensors(x.device))
    sampler.warm_up()
