"""gpt-oss (OpenAI, 2025, arXiv 2508.10925): every other layer has a sliding window; a learned sink takes part in every
softmax; experts have biases and a clamped activation; routing is a softmax over the chosen experts, with a bias.

Gate and up alternate row by row in one tensor. Its experts come as MXFP4 (blocks of outputs by inputs), or as bf16
stored the other way round (inputs by outputs).
"""

from dataclasses import replace

from shared.models.families.common import (
    LAYER,
    LLAMA,
    Family,
    Names,
    grouped_attention,
    layers,
    model,
    router,
    stored,
    window,
)
from shared.models.families.settings import Settings
from shared.models.spec import AttentionSpec, ModelSpec, Stored

_MLP = LAYER + "mlp."
_PARTS = {"gate": ("gate_up_proj", "even"), "up": ("gate_up_proj", "odd"), "down": ("down_proj", "")}


def names(packed: bool) -> Names:
    """Weights of experts are packed or transposed, their biases plain."""
    found = {**LLAMA, **stored({"router": _MLP + "router.weight", "router_bias": _MLP + "router.bias"})}
    found |= stored({"sinks": LAYER + "self_attn.sinks"})
    for role, (name, part) in _PARTS.items():
        weight = Stored(f"{_MLP}experts.{name}", stacked=True, part=part)
        packing = replace(weight, packing="mxfp4") if packed else replace(weight, transposed=True)
        found |= {f"expert_{role}": packing, f"expert_{role}_bias": replace(weight, name=f"{weight.name}_bias")}
    return found


def describe(c: Settings) -> ModelSpec:
    c.only("swiglu_limit", None, 7.0)
    c.only("swiglu_alpha", None, 1.702)
    full = grouped_attention(c, sinks=True)

    def attention(index: int) -> AttentionSpec:
        return replace(full, window=window(c)) if _slides(c, index) else full

    return model(
        c,
        names(packed=c.part("quantization_config").get("quant_method") == "mxfp4"),
        layers(c, attention),
        router(c, score="top_softmax", normalise=False, bias=True),
        expert_hidden=c.count("intermediate_size"),
        activation="clamped_swiglu",
        expert_bias=True,
    )


def _slides(c: Settings, index: int) -> bool:
    if c.get("layer_types") is None:
        return index % 2 == 0
    return c.words("layer_types", c.count("num_hidden_layers"))[index] == "sliding_attention"


_ROPE = {
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "factor": 32.0,
    "original_max_position_embeddings": 4096,
    "rope_type": "yarn",
    "truncate": False,
}
DEFAULTS = {
    "attention_bias": True,
    "head_dim": 64,
    "num_experts_per_tok": 4,
    "rms_norm_eps": 1e-5,
    "rope_parameters": _ROPE,
    "rope_theta": 150_000.0,
    "sliding_window": 128,
}
FAMILY = Family(describe, DEFAULTS, packings=("mxfp4",))
