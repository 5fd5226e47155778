"""OLMoE (Muennighoff et al., 2024, arXiv 2409.02060): q and k are normed over all heads at once, optionally clipped."""

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
    stored,
)
from shared.models.families.settings import Settings
from shared.models.spec import ModelSpec

NAMES = {
    **LLAMA,
    **QK_NORMS,
    **stored({"router": LAYER + "mlp.gate.weight"}),
    **feed_forward("expert", "mlp.experts.{expert}."),
}


def describe(c: Settings) -> ModelSpec:
    clip = 0.0 if c.get("clip_qkv") is None else c.number("clip_qkv")
    attention = grouped_attention(c, qk_norm="projection", clip=clip)
    return model(
        c,
        NAMES,
        layers(c, attention),
        router(c, normalise=c.flag("norm_topk_prob")),
        expert_hidden=c.count("intermediate_size"),
    )


FAMILY = Family(describe, defaults={"norm_topk_prob": False, "rms_norm_eps": 1e-5})
