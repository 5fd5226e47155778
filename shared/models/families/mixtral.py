"""Mixtral (Jiang et al., 2024, arXiv 2401.04088): Mistral's attention; 8 experts, softmax over the chosen two."""

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
    **stored({"router": LAYER + "block_sparse_moe.gate.weight"}),
    **feed_forward("expert", "block_sparse_moe.experts.{expert}.", gate="w1", up="w3", down="w2"),
}


def describe(c: Settings) -> ModelSpec:
    attention = grouped_attention(c, bias=False, out_bias=False, window=window(c))
    return model(c, NAMES, layers(c, attention), router(c), expert_hidden=c.count("intermediate_size"))


FAMILY = Family(describe, defaults={"rms_norm_eps": 1e-5, "rope_theta": 1e6})
