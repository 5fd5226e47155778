"""What fits on an instance of either pool. Pure.

Of a device's memory only a share is planned with (hardware.toml): what is left over holds the runtime, buffers of
frames and activations of experts.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from shared.planning.hardware import Device, Shares
from shared.planning.sizes import Sizes

Floats = NDArray[np.float64]
ROW_VALUES = 12
"""Activations of one row on an attention instance, in hidden states: residual, queries, keys, values, feed-forward."""
LOGIT_BYTES = 4


@dataclass(frozen=True)
class Room:
    """Bytes of one device of each pool, and what they hold."""

    attention_bytes: float
    expert_bytes: float
    slots: int
    """Replicas of each layer on an expert instance; at most one of each expert."""


def room_of(shares: Shares, sizes: Sizes, attention: Device, experts: Device) -> Room:
    """What devices of either pool hold."""
    usable = experts.memory_bytes * shares.memory
    layers = len(sizes.moe_layers)
    slots = int((usable - sizes.router_bytes) // (layers * sizes.expert_bytes))
    return Room(attention.memory_bytes * shares.memory, usable, max(0, min(sizes.experts, slots)))


def least_experts(room: Room, sizes: Sizes) -> int:
    """Expert instances that hold every expert once; 0 when no number does."""
    return -(-sizes.experts // room.slots) if room.slots else 0


def attention_bytes(sizes: Sizes, sequences: Floats, context: float, rows: Floats) -> Floats:
    """Memory of one attention instance, [n]: weights, cache, activations and logits.

    Args:
        sequences: that it decodes, [n].
        context: positions of one, mean.
        rows: of a step, prompts included, [n].
    """
    per_sequence = context * sizes.cache_bytes + sizes.vocab * LOGIT_BYTES
    activations = rows * ROW_VALUES * sizes.hidden * sizes.value_bytes
    return sizes.attention_weights + sequences * per_sequence + activations


def expert_bytes(sizes: Sizes, slots: Floats) -> Floats:
    """Memory of one expert instance with so many replicas per layer."""
    return sizes.router_bytes + slots * len(sizes.moe_layers) * sizes.expert_bytes
