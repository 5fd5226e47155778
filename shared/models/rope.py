"""Tables of rotary position embeddings (Su et al., RoFormer), one per RopeSpec.

Scaled kinds: llama3 (Llama 3.1), yarn (Peng et al., arXiv 2309.00071), longrope (Ding et al., arXiv 2402.13753);
computed as transformers does, in fp32.
"""

import math

import torch
from torch import Tensor

from shared.models.spec import RopeSpec


def rope_tables(spec: RopeSpec, max_positions: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """(cos, sin), each fp32 [max_positions, dim / 2].

    ``max_positions`` is the longest sequence that is served: longrope takes its long form for all of them when it is
    beyond the trained length, because a token's rotation must not depend on how far its sequence got.
    The angle is computed in fp32 as transformers does. Its cosine goes through fp64, because torch's fp32 cosine
    differs in the last bit between its vector loop and the loop's tail, which depends on size and threads.
    """
    powers = spec.theta ** (torch.arange(0, spec.dim, 2, dtype=torch.float32) / spec.dim)
    inverse, size = _inverse(spec, powers, max_positions)
    angle = (torch.arange(max_positions, dtype=torch.float32)[:, None] * inverse).double()
    return (angle.cos() * size).float().to(device), (angle.sin() * size).float().to(device)


def _inverse(spec: RopeSpec, powers: Tensor, max_positions: int) -> tuple[Tensor, float]:
    """(angle per position [dim / 2], factor of cosine and sine)"""
    if spec.kind == "llama3":
        return _llama3(spec, 1.0 / powers), 1.0
    if spec.kind == "yarn":
        return _yarn(spec, powers), _yarn_size(spec)
    if spec.kind == "longrope":
        long = max_positions > spec.scaling["original"]
        factors = torch.tensor(spec.scaling["long_factor" if long else "short_factor"])
        return 1.0 / (factors * powers), _long_size(spec, long)
    return (1.0 / powers) / spec.scaling.get("factor", 1.0), 1.0


def _llama3(spec: RopeSpec, inverse: Tensor) -> Tensor:
    """Long wavelengths are stretched, short ones kept, those between interpolated."""
    s = spec.scaling
    low, high, factor = s["low_freq_factor"], s["high_freq_factor"], s["factor"]
    turns = s["original"] / (2 * math.pi / inverse)  # of the trained length
    smooth = ((turns - low) / (high - low)).clamp(0, 1)
    blended = (1 - smooth) * inverse / factor + smooth * inverse
    return torch.where(turns < low, inverse / factor, torch.where(turns > high, inverse, blended))


def _yarn(spec: RopeSpec, powers: Tensor) -> Tensor:
    """Dimensions that turn often keep their frequency, those that turn seldom are stretched; a ramp lies between."""
    s = spec.scaling

    def dimension(turns: float) -> float:
        return spec.dim * math.log(s["original"] / (turns * 2 * math.pi)) / (2 * math.log(spec.theta))

    low, high = dimension(s["beta_fast"]), dimension(s["beta_slow"])
    if s["truncate"]:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, spec.dim - 1)
    ramp = (torch.arange(spec.dim // 2, dtype=torch.float32) - low) / (high - low if high != low else 0.001)
    kept = 1 - ramp.clamp(0, 1)
    return 1.0 / (s["factor"] * powers) * (1 - kept) + 1.0 / powers * kept


def _yarn_size(spec: RopeSpec) -> float:
    s = spec.scaling

    def strength(scale: float) -> float:
        return 0.1 * scale * math.log(s["factor"]) + 1.0 if s["factor"] > 1 else 1.0

    if "attention_factor" in s:
        return s["attention_factor"]
    if "mscale" in s and "mscale_all_dim" in s:
        return strength(s["mscale"]) / strength(s["mscale_all_dim"])
    return strength(1.0)


def _long_size(spec: RopeSpec, long: bool) -> float:
    """Phi-3.5-MoE gives the factor per form; the paper has one from the ratio of lengths."""
    s = spec.scaling
    given = s.get("long_mscale" if long else "short_mscale", s.get("attention_factor"))
    if given is not None:
        return given
    return math.sqrt(1 + math.log(s["factor"]) / math.log(s["original"])) if s["factor"] > 1 else 1.0
