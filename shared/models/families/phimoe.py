"""Phi-3.5-MoE (Abdin et al., 2024, arXiv 2404.14219): layer norms with bias, longrope, and sparsemixer routing.

Routing is the inference form of GRIN (Liu et al., 2024, arXiv 2409.12136): see ``Kernels.route``.
"""

from shared.models.families.common import (
    LAYER,
    LLAMA,
    Family,
    feed_forward,
    grouped_attention,
    layers,
    model,
    router,
    stored,
    window,
)
from shared.models.families.settings import Settings
from shared.models.spec import ModelSpec

NAMES = {
    **LLAMA,
    **stored(
        {
            "norm_bias": "model.norm.bias",
            "head_bias": "lm_head.bias",
            "input_norm_bias": LAYER + "input_layernorm.bias",
            "post_norm_bias": LAYER + "post_attention_layernorm.bias",
            "router": LAYER + "block_sparse_moe.gate.weight",
        }
    ),
    **feed_forward("expert", "block_sparse_moe.experts.{expert}.", gate="w1", up="w3", down="w2"),
}


def describe(c: Settings) -> ModelSpec:
    c.only("num_experts_per_tok", 2)  # sparsemixer is defined for two
    return model(
        c,
        NAMES,
        layers(c, grouped_attention(c, window=window(c))),
        router(c, score="sparsemixer", normalise=False, jitter=c.number("router_jitter_noise")),
        expert_hidden=c.count("intermediate_size"),
        layer_norm=True,
        head_bias=c.flag("lm_head_bias"),
    )


DEFAULTS = {
    "lm_head_bias": False,
    "num_experts_per_tok": 2,
    "num_local_experts": 16,
    "rms_norm_eps": 1e-5,
    "rope_theta": 1e6,
    "router_jitter_noise": 0.01,
}
FAMILY = Family(describe, DEFAULTS)
