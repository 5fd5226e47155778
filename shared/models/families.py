"""config.json -> ModelSpec. A family is data: how its checkpoints name tensors and config keys, what they leave out.

Understands what hub checkpoints carry (transformers 4: ``num_experts``, ``rope_theta``, ``rope_scaling``) and what
``save_pretrained`` of transformers 5 writes (``num_local_experts``, ``rope_parameters``). Reads no files.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from shared.errors import ModelError, UnsupportedModel
from shared.models.spec import AttentionSpec, LayerSpec, ModelSpec, RopeSpec, RouterSpec

_LAYER = "model.layers.{layer}."
_LLAMA_NAMES = {
    "embed": "model.embed_tokens.weight",
    "norm": "model.norm.weight",
    "head": "lm_head.weight",
    "input_norm": _LAYER + "input_layernorm.weight",
    "post_norm": _LAYER + "post_attention_layernorm.weight",
    **{role: f"{_LAYER}self_attn.{role}_proj.weight" for role in "qkvo"},
    **{f"{role}_bias": f"{_LAYER}self_attn.{role}_proj.bias" for role in "qkvo"},
}
"""What Llama and everything that descends from it calls its tensors."""

_DEFAULTS: dict[str, Any] = {
    "attention_bias": False,
    "decoder_sparse_step": 1,
    "hidden_act": "silu",
    "mlp_only_layers": (),
    "rope_theta": 10_000.0,
    "sliding_window": None,
    "tie_word_embeddings": False,
    "use_sliding_window": True,
}


@dataclass(frozen=True)
class Family:
    """One ``model_type``."""

    names: Mapping[str, str]
    """Tensor role (layout.py) -> name pattern."""
    expert_hidden: str
    """Config key of the intermediate size of a routed expert."""
    qk_norm: bool = False
    defaults: Mapping[str, Any] = field(default_factory=dict)
    """What transformers' config class assumes for keys that config.json leaves out."""
    fixed: Mapping[str, Any] = field(default_factory=dict)
    """Settings that this family does not let config.json change."""


FAMILIES: Mapping[str, Family] = {
    "qwen3_moe": Family(
        names=_LLAMA_NAMES
        | {
            "q_norm": _LAYER + "self_attn.q_norm.weight",
            "k_norm": _LAYER + "self_attn.k_norm.weight",
            "router": _LAYER + "mlp.gate.weight",
            "expert_gate": _LAYER + "mlp.experts.{expert}.gate_proj.weight",
            "expert_up": _LAYER + "mlp.experts.{expert}.up_proj.weight",
            "expert_down": _LAYER + "mlp.experts.{expert}.down_proj.weight",
            "dense_gate": _LAYER + "mlp.gate_proj.weight",
            "dense_up": _LAYER + "mlp.up_proj.weight",
            "dense_down": _LAYER + "mlp.down_proj.weight",
        },
        expert_hidden="moe_intermediate_size",
        qk_norm=True,
        defaults={
            "norm_topk_prob": False,
            "rms_norm_eps": 1e-6,
            "sliding_window": 4096,
            "use_sliding_window": False,
        },
    ),
    "mixtral": Family(
        names=_LLAMA_NAMES
        | {
            "router": _LAYER + "block_sparse_moe.gate.weight",
            "expert_gate": _LAYER + "block_sparse_moe.experts.{expert}.w1.weight",
            "expert_up": _LAYER + "block_sparse_moe.experts.{expert}.w3.weight",
            "expert_down": _LAYER + "block_sparse_moe.experts.{expert}.w2.weight",
        },
        expert_hidden="intermediate_size",
        defaults={"rms_norm_eps": 1e-5, "rope_theta": 1e6},
        fixed={
            "attention_bias": False,
            "decoder_sparse_step": 1,
            "mlp_only_layers": (),
            "norm_topk_prob": True,
            "use_sliding_window": True,
        },
    ),
}

_ACTIVATIONS = {"silu": "silu", "swish": "silu", "gelu": "gelu", "gelu_pytorch_tanh": "gelu_pytorch_tanh"}


class _Settings:
    """Typed access to config.json; errors name the file and the key."""

    def __init__(self, where: str, values: Mapping[str, Any]) -> None:
        self.where = where
        self.values = values

    def get(self, *keys: str) -> Any:
        """The first of ``keys`` that is set to something."""
        return next((v for v in map(self.values.get, keys) if v is not None), None)

    def count(self, *keys: str, least: int = 1) -> int:
        value = self.get(*keys)
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise self.error(" or ".join(keys), value, f"a whole number of at least {least}")
        return value

    def number(self, key: str) -> float:
        value = self.get(key)
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < float("inf"):
            raise self.error(key, value, "a positive number")
        return float(value)

    def counts(self, key: str) -> tuple[int, ...]:
        """A list of ids; one bare id counts as a list, null as an empty one."""
        value = self.get(key)
        if value is None:
            return ()
        ids = value if isinstance(value, list | tuple) else [value]
        if any(isinstance(i, bool) or not isinstance(i, int) or i < 0 for i in ids):
            raise self.error(key, value, "an id or a list of ids")
        return tuple(ids)

    def flag(self, key: str) -> bool:
        value = self.get(key)
        if not isinstance(value, bool):
            raise self.error(key, value, "true or false")
        return value

    def error(self, key: str, value: object, wanted: str) -> ModelError:
        state = "is missing" if value is None else f"is {value!r}"
        return ModelError(self.where, f"{key} {state}, but has to be {wanted}")


def parse_config(config: Mapping[str, Any], generation: Mapping[str, Any], where: str) -> ModelSpec:
    """Turn config.json (and generation_config.json, {} if there is none) into a ModelSpec.

    Raises UnsupportedModel for a healthy config that asks for what is not implemented, ModelError for a broken one.
    ``where`` is the path that errors name.
    """
    kind = config.get("model_type")
    family = FAMILIES.get(kind) if isinstance(kind, str) else None
    if family is None:
        supported = ", ".join(sorted(FAMILIES))
        raise UnsupportedModel(where, f"model_type {kind!r} is not supported; supported: {supported}")
    c = _Settings(where, {**_DEFAULTS, **family.defaults, **config, **family.fixed})
    if c.get("quantization_config"):
        raise UnsupportedModel(where, "quantised checkpoints are not supported (quantization_config is set)")
    router = _router(c)
    layers = _layers(c, _attention(c, family))
    return ModelSpec(
        family=str(kind),
        vocab_size=c.count("vocab_size"),
        hidden=c.count("hidden_size"),
        expert_hidden=c.count(family.expert_hidden),
        dense_hidden=c.count("intermediate_size"),
        activation=_activation(c),
        norm_eps=c.number("rms_norm_eps"),
        tied_head=c.flag("tie_word_embeddings"),
        max_positions=c.count("max_position_embeddings"),
        eos_ids=_eos_ids(c, generation),
        router=router,
        layers=layers,
        names=dict(family.names),
    )


def _router(c: _Settings) -> RouterSpec:
    experts, top_k = c.count("num_local_experts", "num_experts"), c.count("num_experts_per_tok")
    if top_k > experts:
        raise c.error("num_experts_per_tok", top_k, f"no more than the {experts} experts")
    return RouterSpec(experts=experts, top_k=top_k, normalise=c.flag("norm_topk_prob"))


def _attention(c: _Settings, family: Family) -> AttentionSpec:
    heads = c.count("num_attention_heads")
    kv_heads = heads if c.get("num_key_value_heads") is None else c.count("num_key_value_heads")
    if heads % kv_heads:
        raise c.error("num_key_value_heads", kv_heads, f"a divisor of the {heads} attention heads")
    head_dim = c.count("hidden_size") // heads if c.get("head_dim") is None else c.count("head_dim")
    if head_dim < 2 or head_dim % 2:
        raise c.error("head_dim", head_dim, "an even number")
    windowed = c.flag("use_sliding_window") and c.get("sliding_window") is not None
    return AttentionSpec(
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        scale=head_dim**-0.5,
        rope=_rope(c, head_dim),
        qk_norm=family.qk_norm,
        bias=c.flag("attention_bias"),
        out_bias=c.flag("attention_bias"),
        window=c.count("sliding_window") if windowed else 0,
    )


def _rope(c: _Settings, head_dim: int) -> RopeSpec:
    scaled = c.get("rope_scaling", "rope_parameters") or {}
    if not isinstance(scaled, Mapping):
        raise c.error("rope_parameters or rope_scaling", scaled, "an object")
    p = _Settings(c.where, {"rope_theta": c.get("rope_theta"), **scaled})
    kind = p.get("rope_type", "type") or "default"
    if kind not in ("default", "linear"):
        raise UnsupportedModel(c.where, f"rope type {kind!r} is not supported; supported: default, linear")
    if (p.get("partial_rotary_factor") or c.get("partial_rotary_factor") or 1) != 1:
        raise UnsupportedModel(c.where, "partial_rotary_factor other than 1 is not supported")
    scaling = {"factor": p.number("factor")} if kind == "linear" else {}
    return RopeSpec(theta=p.number("rope_theta"), dim=head_dim, kind=kind, scaling=scaling)


def _layers(c: _Settings, attention: AttentionSpec) -> tuple[LayerSpec, ...]:
    """A layer has experts unless it is listed as dense or falls between the sparse steps."""
    dense, step = c.counts("mlp_only_layers"), c.count("decoder_sparse_step")
    layers = tuple(
        LayerSpec(index=i, moe=i not in dense and (i + 1) % step == 0, attention=attention)
        for i in range(c.count("num_hidden_layers"))
    )
    if not any(layer.moe for layer in layers):
        raise UnsupportedModel(c.where, "no layer has routed experts")
    return layers


def _activation(c: _Settings) -> str:
    name = c.get("hidden_act")
    if name not in _ACTIVATIONS:
        supported = ", ".join(_ACTIVATIONS)
        raise UnsupportedModel(c.where, f"hidden_act {name!r} is not supported; supported: {supported}")
    return _ACTIVATIONS[name]


def _eos_ids(c: _Settings, generation: Mapping[str, Any]) -> tuple[int, ...]:
    """End-of-sequence ids: generation_config.json is more specific than config.json."""
    for settings in (_Settings(c.where, generation), c):
        if ids := settings.counts("eos_token_id"):
            return ids
    return ()
