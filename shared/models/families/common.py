"""What families have in common: tensor names that descend from Llama, and the parts of a ModelSpec that most read
from config.json in the same way.

Understands what hub checkpoints carry (transformers 4: ``rope_theta``, ``rope_scaling``) and what ``save_pretrained``
of transformers 5 writes (``rope_parameters``).
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from shared.errors import UnsupportedModel
from shared.models.families.rope_settings import rope_scaling
from shared.models.families.settings import Settings
from shared.models.spec import AttentionSpec, LayerSpec, ModelSpec, RopeSpec, RouterSpec, Stored

LAYER = "model.layers.{layer}."
Names = Mapping[str, Stored]


def stored(names: Mapping[str, str]) -> dict[str, Stored]:
    """Names of tensors that are stored plainly."""
    return {role: Stored(name) for role, name in names.items()}


LLAMA: Names = stored(
    {
        "embed": "model.embed_tokens.weight",
        "norm": "model.norm.weight",
        "head": "lm_head.weight",
        "input_norm": LAYER + "input_layernorm.weight",
        "post_norm": LAYER + "post_attention_layernorm.weight",
        **{role: f"{LAYER}self_attn.{role}_proj.weight" for role in "qkvo"},
        **{f"{role}_bias": f"{LAYER}self_attn.{role}_proj.bias" for role in "qkvo"},
    }
)
"""What Llama and everything that descends from it calls its tensors."""
QK_NORMS: Names = stored({f"{role}_norm": f"{LAYER}self_attn.{role}_norm.weight" for role in "qk"})


def feed_forward(
    prefix: str, where: str, gate: str = "gate_proj", up: str = "up_proj", down: str = "down_proj"
) -> Names:
    """Roles PREFIX_gate, _up and _down under ``where``, e.g. "mlp.experts.{expert}."."""
    parts = {"gate": gate, "up": up, "down": down}
    return stored({f"{prefix}_{part}": f"{LAYER}{where}{name}.weight" for part, name in parts.items()})


@dataclass(frozen=True)
class Family:
    """One page of families/: how to read the configs of some model types."""

    describe: Callable[[Settings], ModelSpec]
    defaults: Mapping[str, Any] = field(default_factory=dict)
    """What transformers' config class assumes for keys that config.json leaves out."""
    packings: tuple[str, ...] = ("fp8",)
    """Quantisation methods whose checkpoints can be read."""


DEFAULTS: Mapping[str, Any] = {
    "attention_bias": False,
    "hidden_act": "silu",
    "rope_theta": 10_000.0,
    "tie_word_embeddings": False,
}
ACTIVATIONS = {"silu": "silu", "swish": "silu", "gelu": "gelu", "gelu_pytorch_tanh": "gelu_pytorch_tanh"}


def model(c: Settings, names: Names, layers: tuple[LayerSpec, ...], router: RouterSpec, **own: Any) -> ModelSpec:
    """A ModelSpec of what is usual, and the family's ``own`` fields."""
    if not any(layer.moe for layer in layers):
        raise UnsupportedModel(c.where, "no layer has routed experts")
    usual: dict[str, Any] = {
        "family": c.get("model_type"),
        "vocab_size": c.count("vocab_size"),
        "hidden": c.count("hidden_size"),
        "dense_hidden": c.count("intermediate_size"),
        "activation": ACTIVATIONS[c.only("hidden_act", *ACTIVATIONS)],
        "norm_eps": c.number("rms_norm_eps"),
        "tied_head": c.flag("tie_word_embeddings"),
        "max_positions": c.count("max_position_embeddings"),
        "eos_ids": c.counts("eos_token_id"),
        "fp8_block": _fp8_block(c),
    }
    return ModelSpec(**(usual | own), names=names, layers=layers, router=router)


def router(c: Settings, **own: Any) -> RouterSpec:
    """Sizes of the gate, whatever the family calls the number of experts, and the family's ``own`` fields."""
    experts = c.count("num_local_experts", "num_experts", "n_routed_experts")
    top_k = c.count("num_experts_per_tok")
    if top_k > experts:
        raise c.error("num_experts_per_tok", top_k, f"no more than the {experts} experts")
    return RouterSpec(experts=experts, top_k=top_k, **own)


def grouped_attention(c: Settings, interleaved: bool = False, **own: Any) -> AttentionSpec:
    """Grouped-query attention as in Llama, and the family's ``own`` fields."""
    heads = c.count("num_attention_heads")
    kv_heads = heads if c.get("num_key_value_heads") is None else c.count("num_key_value_heads")
    if heads % kv_heads:
        raise c.error("num_key_value_heads", kv_heads, f"a divisor of the {heads} attention heads")
    head_dim = c.count("hidden_size") // heads if c.get("head_dim") is None else c.count("head_dim")
    if head_dim < 2 or head_dim % 2:
        raise c.error("head_dim", head_dim, "an even number")
    usual: dict[str, Any] = {
        "scale": head_dim**-0.5,
        "rope": rope(c, head_dim, interleaved),
        "bias": c.flag("attention_bias"),
        "out_bias": c.flag("attention_bias"),
    }
    return AttentionSpec(heads=heads, kv_heads=kv_heads, head_dim=head_dim, **(usual | own))


def rope(c: Settings, head_dim: int, interleaved: bool = False) -> RopeSpec:
    """The rotation, from either form of config.json."""
    scaled = c.part("rope_scaling", "rope_parameters").values
    p = Settings(c.where, {"rope_theta": c.get("rope_theta"), **scaled})
    share = p.get("partial_rotary_factor") or c.get("partial_rotary_factor") or 1.0
    dim = int(head_dim * share)
    if not 2 <= dim <= head_dim or dim % 2:
        raise c.error("partial_rotary_factor", share, f"one that leaves an even part of {head_dim} dimensions")
    kind = p.get("rope_type", "type") or "default"
    scaling = rope_scaling(kind, p, c, dim)
    return RopeSpec(theta=p.number("rope_theta"), dim=dim, kind=kind, scaling=scaling, interleaved=interleaved)


def window(c: Settings) -> int:
    """Sliding window, 0 when it is not set (Qwen2 writes 0 itself)."""
    return c.count("sliding_window") if c.get("sliding_window") else 0


def layers(
    c: Settings,
    attention: AttentionSpec | Callable[[int], AttentionSpec],
    dense: Callable[[int], bool] = lambda _: False,
) -> tuple[LayerSpec, ...]:
    """All layers: their attention is one for all or made per index; ``dense`` says which have no experts."""
    count = c.count("num_hidden_layers")
    each = [attention if isinstance(attention, AttentionSpec) else attention(i) for i in range(count)]
    return tuple(LayerSpec(index=i, moe=not dense(i), attention=a) for i, a in enumerate(each))


def first_dense(c: Settings) -> Callable[[int], bool]:
    """DeepSeek's and GLM's rule: the first layers have no experts."""
    count = c.count("first_k_dense_replace", least=0)
    return lambda index: index < count


def sparse_steps(c: Settings) -> Callable[[int], bool]:
    """Qwen's rule: a layer has experts unless it is listed as dense or falls between the sparse steps."""
    listed, step = c.counts("mlp_only_layers"), c.count("decoder_sparse_step")
    return lambda index: index in listed or (index + 1) % step != 0


def _fp8_block(c: Settings) -> tuple[int, int] | None:
    """Shape of the blocks of an FP8 checkpoint that share a scale."""
    packed = c.part("quantization_config")
    if packed.get("quant_method") != "fp8":
        return None
    block = packed.counts("weight_block_size")
    if len(block) != 2 or 0 in block:
        raise UnsupportedModel(c.where, "FP8 without weight_block_size (two sizes) is not supported")
    return block[0], block[1]
