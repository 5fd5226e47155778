"""DeepSeek-V2 (DeepSeek-AI, 2024, arXiv 2405.04434): latent attention; shared experts; groups of experts."""

import math

from shared.models.families.common import (
    LAYER,
    LLAMA,
    Family,
    Names,
    feed_forward,
    first_dense,
    layers,
    model,
    rope,
    router,
    stored,
)
from shared.models.families.settings import Settings
from shared.models.spec import AttentionSpec, LatentSpec, ModelSpec, RopeSpec

_ATTENTION = {
    "q_a": "q_a_proj.weight",
    "q_a_bias": "q_a_proj.bias",
    "q_a_norm": "q_a_layernorm.weight",
    "q_b": "q_b_proj.weight",
    "kv_a": "kv_a_proj_with_mqa.weight",
    "kv_a_bias": "kv_a_proj_with_mqa.bias",
    "kv_norm": "kv_a_layernorm.weight",
    "kv_b": "kv_b_proj.weight",
}
NAMES: Names = {
    **LLAMA,
    **stored({role: f"{LAYER}self_attn.{name}" for role, name in _ATTENTION.items()}),
    **stored({"router": LAYER + "mlp.gate.weight"}),
    **feed_forward("expert", "mlp.experts.{expert}."),
    **feed_forward("shared", "mlp.shared_experts."),
    **feed_forward("dense", "mlp."),
}


def latent_attention(c: Settings, interleaved: bool) -> AttentionSpec:
    """Section 2.1 of the paper: one latent per token for all heads, and one rotated key."""
    latent = LatentSpec(
        rank=c.count("kv_lora_rank"),
        query_rank=0 if c.get("q_lora_rank") is None else c.count("q_lora_rank"),
        nope_dim=c.count("qk_nope_head_dim"),
        rope_dim=c.count("qk_rope_head_dim", least=2),
        value_dim=c.count("v_head_dim"),
    )
    head_dim = latent.nope_dim + latent.rope_dim
    rotation = rope(c, latent.rope_dim, interleaved)
    return AttentionSpec(
        heads=c.count("num_attention_heads"),
        kv_heads=1,
        head_dim=head_dim,
        scale=head_dim**-0.5 * _sharpness(rotation) ** 2,
        rope=rotation,
        bias=c.flag("attention_bias"),
        out_bias=c.flag("attention_bias"),
        latent=latent,
    )


def _sharpness(rotation: RopeSpec) -> float:
    """With scaled positions the scores grow by the square of this (yarn, arXiv 2309.00071, equation 22)."""
    factor, strength = rotation.scaling.get("factor", 1.0), rotation.scaling.get("mscale_all_dim", 0.0)
    return 0.1 * strength * math.log(factor) + 1.0 if factor > 1 else 1.0


def describe(c: Settings) -> ModelSpec:
    grouped = c.only("topk_method", "greedy", "group_limited_greedy") == "group_limited_greedy"
    groups = {"groups": c.count("n_group"), "top_groups": c.count("topk_group")} if grouped else {}
    c.only("scoring_func", None, "softmax")
    c.only("moe_layer_freq", None, 1)
    inner = c.count("moe_intermediate_size")
    return model(
        c,
        NAMES,
        layers(c, latent_attention(c, interleaved=True), dense=first_dense(c)),
        router(c, normalise=False, scale=c.number("routed_scaling_factor"), **groups),
        expert_hidden=inner,
        shared_hidden=inner * c.count("n_shared_experts"),
    )


DEFAULTS = {
    "first_k_dense_replace": 0,
    "n_shared_experts": 2,
    "q_lora_rank": 1536,  # null, not left out, stands for direct queries
    "rms_norm_eps": 1e-6,
    "routed_scaling_factor": 1.0,
    "topk_method": "greedy",
}
FAMILY = Family(describe, DEFAULTS)
