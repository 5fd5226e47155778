"""Qwen2-MoE (Yang et al., 2024, arXiv 2407.10671): biased q, k, v; shared experts behind a sigmoid gate."""

from dataclasses import replace

from shared.models.families.common import (
    LAYER,
    LLAMA,
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
from shared.models.spec import AttentionSpec, ModelSpec

NAMES = {
    **LLAMA,
    **stored({"router": LAYER + "mlp.gate.weight", "shared_router": LAYER + "mlp.shared_expert_gate.weight"}),
    **feed_forward("expert", "mlp.experts.{expert}."),
    **feed_forward("shared", "mlp.shared_expert."),
    **feed_forward("dense", "mlp."),
}


def describe(c: Settings) -> ModelSpec:
    full = grouped_attention(c, bias=c.flag("qkv_bias"), out_bias=False)

    def attention(index: int) -> AttentionSpec:
        return replace(full, window=window(c)) if _slides(c, index) else full

    return model(
        c,
        NAMES,
        layers(c, attention, dense=sparse_steps(c)),
        router(c, normalise=c.flag("norm_topk_prob")),
        expert_hidden=c.count("moe_intermediate_size"),
        shared_hidden=c.count("shared_expert_intermediate_size"),
        shared_gate=True,
    )


def _slides(c: Settings, index: int) -> bool:
    """Listed per layer by transformers 5; before that every other one of the first ``max_window_layers``."""
    if not c.flag("use_sliding_window"):
        return False
    if c.get("layer_types") is not None:
        return c.words("layer_types", c.count("num_hidden_layers"))[index] == "sliding_attention"
    return index % 2 == 0 and index < c.count("max_window_layers", least=0)


DEFAULTS = {
    "decoder_sparse_step": 1,
    "max_window_layers": 28,
    "norm_topk_prob": False,
    "qkv_bias": True,
    "rms_norm_eps": 1e-6,
    "sliding_window": 4096,
    "use_sliding_window": False,
}
FAMILY = Family(describe, DEFAULTS)
