"""Makes an instance's engine out of its settings: kernels, weights, cache, data plane; compiles everything.

All of it happens in the compute thread, to which the data plane and the tensors belong from then on.
"""

from contextlib import closing
from dataclasses import dataclass

import torch

from services.attention import sampler
from services.attention.batching import Batcher, Limits
from services.attention.engine import Emit, Engine
from services.attention.exchange import Exchange
from services.attention.kv_cache import BlockPool
from services.attention.local_exchange import LocalExchange
from services.attention.mesh_exchange import MeshExchange
from services.attention.micro_batches import MicroBatching
from services.attention.sizing import context_length, plan_limits
from services.attention.step import ModelRunner
from services.attention.tap import RoutingTap
from services.attention.ways import Gate, Phase, Ways
from shared.compute import ComputeSide
from shared.config import AttentionConfig
from shared.keep_awake import KeepAwake
from shared.kernels.base import Kernels, select_kernels
from shared.models.decoder import Decoder
from shared.models.local import LocalExperts
from shared.models.moe import MoeLayer
from shared.models.precision import choose_precision
from shared.pace import UNPACED, Pace


@dataclass
class Built:
    """Everything the main thread needs to know."""

    engine: Engine
    exchange: Exchange
    limits: Limits
    pace: Pace
    awake: KeepAwake
    tap: RoutingTap | None
    """None: a monolith has no exchanges."""

    def run(self) -> None:
        """The compute thread's work until ``engine.stop``."""
        with closing(self.exchange), closing(self.awake):
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
    tap = None if config.monolith else RoutingTap(spec.moe_layers, spec.router.experts, side.instance.incarnation)
    exchange, pace = make_exchange(config, side, kernels, dtype, tap)
    micro_batching = MicroBatching(1 if config.monolith else config.micro_batches)
    runner = ModelRunner(decoder, cache, exchange, limits.block_size, config.trace_layers, micro_batching, pace)
    side.say("compiling kernels")
    with torch.inference_mode():
        exchange.warm_up(spec.moe_layers[0], runner.warm_up())
        sampler.warm_up()
    batcher = Batcher(limits, BlockPool(limits.kv_blocks, limits.block_size, config.prefix_cache))
    awake, record = side.keep_awake(), side.instance.telemetry.record
    engine = Engine(runner, exchange, batcher, emit, config.no_home_deadline, record=record, awake=awake)
    return Built(engine, exchange, limits, pace, awake, tap)


def make_exchange(
    config: AttentionConfig, side: ComputeSide, kernels: Kernels, dtype: torch.dtype, tap: RoutingTap | None
) -> tuple[Exchange, Pace]:
    """Over the data plane, or all experts here; and the pace of this instance. Raises ModelError and TransportError."""
    spec = side.checkpoint.spec
    if config.monolith:
        side.say("loading experts")
        return LocalExchange(LocalExperts(side.checkpoint, kernels, side.device, dtype)), UNPACED
    transport, pace = side.data_plane(config.max_batched_tokens, config.ucx_tls)
    gates = {index: MoeLayer(side.checkpoint, kernels, side.device, dtype, index) for index in spec.moe_layers}
    exchange = MeshExchange(
        transport, kernels, hidden=spec.hidden, dtype=dtype, top_k=spec.router.top_k,
        mesh=side.mesh, incarnation=side.instance.incarnation, deadline=config.exchange_deadline, device=side.device,
        max_rows=config.max_batched_tokens, gates=gates, ways=make_ways(config), group_wait=config.group_wait,
        tap=tap, partial=config.combine == "partial" or (config.combine == "auto" and side.device.type != "cpu"),
    )  # fmt: skip
    return exchange, pace


def make_ways(config: AttentionConfig) -> Ways:
    """What the settings leave to choose."""
    phase = None if config.phase == "auto" else Phase(config.phase)
    return Ways(phase, None if config.gate == "auto" else Gate(config.gate))
