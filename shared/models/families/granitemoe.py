"""Granite-3.0 MoE (IBM Granite Team, 2024): Mixtral's shape with multipliers from muP; experts fused in two tensors.

Stored: input_linear [experts, 2 * inner, hidden], gate above up, and output_linear [experts, hidden, inner].
"""

from shared.models.families.common import LAYER, LLAMA, Family, grouped_attention, layers, model, router, stored
from shared.models.families.settings import Settings
from shared.models.spec import ModelSpec, Stored

_MOE = LAYER + "block_sparse_moe."
NAMES = {
    **LLAMA,
    **stored({"router": _MOE + "router.layer.weight"}),
    "expert_gate": Stored(_MOE + "input_linear.weight", stacked=True, part="first"),
    "expert_up": Stored(_MOE + "input_linear.weight", stacked=True, part="second"),
    "expert_down": Stored(_MOE + "output_linear.weight", stacked=True),
}


def describe(c: Settings) -> ModelSpec:
    residual = c.number("residual_multiplier")
    return model(
        c,
        NAMES,
        layers(c, grouped_attention(c, scale=c.number("attention_multiplier"))),
        router(c, score="top_softmax", normalise=False, scale=residual),
        expert_hidden=c.count("intermediate_size"),
        embed_scale=c.number("embedding_multiplier"),
        residual_scale=residual,
        logit_scale=1.0 / c.number("logits_scaling"),
    )


DEFAULTS = {
    "attention_multiplier": 1.0,
    "embedding_multiplier": 1.0,
    "logits_scaling": 1.0,
    "num_experts_per_tok": 2,
    "num_local_experts": 8,
    "residual_multiplier": 1.0,
    "rms_norm_eps": 1e-6,
}
FAMILY = Family(describe, DEFAULTS)
