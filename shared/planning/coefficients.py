"""The coefficients of a model on devices that nobody has at hand: rooflines of published peaks. Pure.

What is fitted on a live mesh takes their place. Every time is the larger of what has to be read and what has to be
computed, at the shares of hardware.toml, and its overhead.
"""

from shared.device_profile import DeviceProfile
from shared.perf_model import Costs
from shared.planning.hardware import Device, Hardware, Shares
from shared.planning.sizes import Sizes


def costs_of(hardware: Hardware, sizes: Sizes, attention: Device, experts: Device) -> Costs:
    """One model with either pool on its kind of device."""
    shares, overheads = hardware.shares, hardware.overheads
    dense = sizes.dense_params * sizes.weight_bytes
    return Costs(
        attention=attention_profile(hardware, sizes, attention),
        experts=DeviceProfile(
            name=experts.name,
            about=experts.about,
            experts_s=overheads.experts_s,
            expert_s=read_s(shares, experts, sizes.expert_bytes),
        ),
        layers=sizes.layers,
        moe_layers=len(sizes.moe_layers),
        prefill_position_s=compute_s(shares, attention, sizes.position_flops),
        dense_s=overheads.shared_s + read_s(shares, attention, dense) if dense else 0.0,
        dense_row_s=compute_s(shares, attention, 2 * sizes.dense_params),
        expert_row_s=compute_s(shares, experts, 2 * sizes.expert_params),
    )


def attention_profile(hardware: Hardware, sizes: Sizes, device: Device) -> DeviceProfile:
    """The attention side: c_a reads a layer's weights, alpha multiplies by them, c_kv reads the cache and computes."""
    shares, overheads = hardware.shares, hardware.overheads
    cached = sizes.cache_values * sizes.value_bytes
    return DeviceProfile(
        name=device.name,
        about=device.about,
        attention_floor_s=overheads.attention_s + read_s(shares, device, sizes.attention_params * sizes.weight_bytes),
        attention_row_s=compute_s(shares, device, 2 * sizes.attention_params),
        attention_position_s=max(
            cached / (device.bytes_per_s * shares.cache), compute_s(shares, device, sizes.position_flops)
        ),
        shared_s=overheads.shared_s + read_s(shares, device, sizes.shared_params * sizes.weight_bytes)
        if sizes.shared_params
        else 0.0,
        shared_row_s=compute_s(shares, device, 2 * sizes.shared_params),
        head_s=overheads.head_s + read_s(shares, device, sizes.head_bytes),
        head_row_s=compute_s(shares, device, 2 * sizes.vocab * sizes.hidden),
    )


def read_s(shares: Shares, device: Device, nbytes: float) -> float:
    """Seconds to read so many bytes of weights."""
    return nbytes / (device.bytes_per_s * shares.weights)


def compute_s(shares: Shares, device: Device, flops: float) -> float:
    """Seconds of so many operations."""
    return flops / (device.flops * shares.compute)
