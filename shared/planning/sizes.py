"""What a model costs to hold and to compute, from its config.json alone: parameters, bytes and operations.

Parameters are counted from the shapes of layout.py, so that every family of shared/models/families is covered. Norms
and biases are counted, their operations are not. No weights, no torch.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from statistics import fmean
from typing import Any

from shared.errors import ConfigError
from shared.models.families import parse_config
from shared.models.index import read_json
from shared.models.layout import Shape, decoder_roles, expert_roles, outer_roles, router_roles
from shared.models.spec import AttentionSpec, LayerSpec, ModelSpec

_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


@dataclass(frozen=True)
class Sizes:
    """One model. What is said of a layer is the mean over its layers where they differ."""

    name: str
    layers: int
    moe_layers: tuple[int, ...]
    experts: int
    top_k: int
    hidden: int
    vocab: int
    attention_params: float
    """Of one layer, norms included."""
    router_params: float
    shared_params: float
    """Shared experts of one layer with experts, together."""
    expert_params: float
    """One routed expert."""
    dense_params: float
    """Feed-forward of one layer without experts."""
    outer_params: float
    """Embeddings, last norm and head."""
    weight_bytes: int
    """Of one parameter of a layer, as it is served."""
    value_bytes: int
    """Of one value of the cache, of a row that travels, and of a parameter outside the layers."""
    cache_values: float
    """Per token and layer."""
    position_flops: float
    """Of one row and one position that it attends to, in one layer."""
    windows: tuple[int, ...]
    """Positions that each layer attends to at most; 0: all."""

    @property
    def dense_layers(self) -> int:
        return self.layers - len(self.moe_layers)

    @property
    def expert_bytes(self) -> float:
        return self.expert_params * self.weight_bytes

    @property
    def attention_weights(self) -> float:
        """Bytes of an attention instance's weights: everything but routers and routed experts."""
        inner = self.layers * self.attention_params + self.dense_layers * self.dense_params
        inner += len(self.moe_layers) * self.shared_params
        return inner * self.weight_bytes + self.outer_params * self.value_bytes

    @property
    def router_bytes(self) -> float:
        """Gates of all layers."""
        return len(self.moe_layers) * self.router_params * self.value_bytes

    @property
    def cache_bytes(self) -> float:
        """Of one token, all layers: the cache keeps every position, also of layers with a window."""
        return self.layers * self.cache_values * self.value_bytes

    @property
    def head_bytes(self) -> float:
        return self.vocab * self.hidden * self.value_bytes

    def attended(self, context: float) -> float:
        """Positions that a row with so many before it attends to, mean over layers."""
        return fmean(min(context, window) if window else context for window in self.windows)


def sizes_of(spec: ModelSpec, name: str, value_bytes: int = 2) -> Sizes:
    """Count a model. ``value_bytes``: see ``Sizes``; FP8 checkpoints have one byte per parameter of a layer."""
    decoders = [decoder_roles(spec, layer) for layer in spec.layers]
    own = [_count(_without(roles, "shared_", "dense_")) for roles in decoders]
    moe = [roles for layer, roles in zip(spec.layers, decoders, strict=True) if layer.moe]
    dense = [roles for layer, roles in zip(spec.layers, decoders, strict=True) if not layer.moe]
    return Sizes(
        name=name,
        layers=len(spec.layers),
        moe_layers=spec.moe_layers,
        experts=spec.router.experts,
        top_k=spec.router.top_k,
        hidden=spec.hidden,
        vocab=spec.vocab_size,
        attention_params=fmean(own),
        router_params=_count(router_roles(spec)),
        shared_params=fmean(_count(_only(roles, "shared_")) for roles in moe),
        expert_params=_count(expert_roles(spec)),
        dense_params=fmean([_count(_only(roles, "dense_")) for roles in dense] or [0]),
        outer_params=_count(outer_roles(spec)),
        weight_bytes=1 if spec.fp8_block else value_bytes,
        value_bytes=value_bytes,
        cache_values=fmean(cached_values(layer.attention) for layer in spec.layers),
        position_flops=fmean(flops_per_position(layer.attention) for layer in spec.layers),
        windows=tuple(map(_window, spec.layers)),
    )


def read_sizes(model: Path) -> Sizes:
    """Sizes of a checkpoint's directory, or of a config.json alone. Raises ConfigError, ModelError."""
    file = model / "config.json" if model.is_dir() else model
    if not file.is_file():
        raise ConfigError("--model", f"{model}: neither a directory with a config.json nor such a file")
    config = read_json(file)
    spec = parse_config(config, {}, str(file))
    name = file.parent.name if file.name == "config.json" else file.stem
    return sizes_of(spec, name or str(file), _value_bytes(config))


def _value_bytes(config: Mapping[str, Any]) -> int:
    """Two, unless the checkpoint is fp32: other dtypes are served as bf16."""
    return _BYTES.get(str(config.get("dtype") or config.get("torch_dtype")), 2)


def cached_values(a: AttentionSpec) -> int:
    """What the cache holds per token and layer: keys and values, or the latent of both and one rotated key."""
    return a.latent.rank + a.latent.rope_dim if a.latent else 2 * a.kv_heads * a.head_dim


def flops_per_position(a: AttentionSpec) -> int:
    """Scores and weighted values of all heads; latent attention computes both in the latent (DeepSeek-V2, 2.1.2)."""
    if a.latent:
        return 2 * a.heads * (2 * a.latent.rank + a.latent.rope_dim)
    return 4 * a.heads * a.head_dim


def _window(layer: LayerSpec) -> int:
    limits = [limit for limit in (layer.attention.window, layer.attention.chunk) if limit]
    return min(limits, default=0)


def _count(roles: Mapping[str, Shape]) -> int:
    return sum(prod(shape) for shape in roles.values())


def _only(roles: Mapping[str, Shape], prefix: str) -> dict[str, Shape]:
    return {role: shape for role, shape in roles.items() if role.startswith(prefix)}


def _without(roles: Mapping[str, Shape], *prefixes: str) -> dict[str, Shape]:
    return {role: shape for role, shape in roles.items() if not role.startswith(prefixes)}
