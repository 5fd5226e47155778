"""Qwen3-MoE (Yang et al., 2025, arXiv 2505.09388): q and k are normed per head; no shared experts."""

from shared.models.families.common import (
    LAYER,
    LLAMA,
    QK_NORMS,
    Family,
    feed_forward,
    grouped_attention,
    layers,
    model,
    router,
    sparse_steps,
    stored,
    window,
)
from shared.models.families.settings import Settings
from shared.models.spec import ModelSpec

NAMES = {
    **LLAMA,
    **QK_NORMS,
    **stored({"router": LAYER + "mlp.gate.weight"}),
    **feed_forward("expert", "mlp.experts.{expert}."),
    **feed_forward("dense", "mlp."),
}


def describe(c: Settings) -> ModelSpec:
    attention = grouped_attention(c, qk_norm="head", window=window(c) if c.flag("use_sliding_window") else 0)
    return model(
        c,
        NAMES,
        layers(c, attention, dense=sparse_steps(c)),
        router(c, normalise=c.flag("norm_topk_prob")),
        expert_hidden=c.count("moe_intermediate_size"),
    )


DEFAULTS = {
    "decoder_sparse_step": 1,
    "norm_topk_prob": False,
    "rms_norm_eps": 1e-6,
    "sliding_window": 4096,
    "use_sliding_window": False,
}
FAMILY = Family(describe, DEFAULTS)
