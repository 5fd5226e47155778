"""GLM-4.5 (GLM-4.5 Team, 2025, arXiv 2508.06471): DeepSeek-V3's routing over grouped-query attention.

Half of each head is rotated; q, k and v may have biases, the output projection never. Layers for multi-token prediction
are not used.
"""

from shared.models.families.common import (
    LAYER,
    LLAMA,
    QK_NORMS,
    Family,
    feed_forward,
    first_dense,
    grouped_attention,
    layers,
    model,
    stored,
)
from shared.models.families.deepseek_v3 import CORRECTION, corrected_router
from shared.models.families.settings import Settings
from shared.models.spec import ModelSpec

NAMES = {
    **LLAMA,
    **QK_NORMS,
    **CORRECTION,
    **stored({"router": LAYER + "mlp.gate.weight"}),
    **feed_forward("expert", "mlp.experts.{expert}."),
    **feed_forward("shared", "mlp.shared_experts."),
    **feed_forward("dense", "mlp."),
}


def describe(c: Settings) -> ModelSpec:
    attention = grouped_attention(c, qk_norm="head" if c.flag("use_qk_norm") else "", out_bias=False)
    inner = c.count("moe_intermediate_size")
    return model(
        c,
        NAMES,
        layers(c, attention, dense=first_dense(c)),
        corrected_router(c),
        expert_hidden=inner,
        shared_hidden=inner * c.count("n_shared_experts"),
    )


DEFAULTS = {
    "first_k_dense_replace": 1,
    "n_group": 1,
    "n_shared_experts": 1,
    "norm_topk_prob": True,
    "partial_rotary_factor": 0.5,
    "rms_norm_eps": 1e-5,
    "routed_scaling_factor": 1.0,
    "topk_group": 1,
    "use_qk_norm": False,
}
FAMILY = Family(describe, DEFAULTS)
