"""DeepSeek-V3 and R1 (DeepSeek-AI, 2024, arXiv 2412.19437): V2's attention; sigmoid routing with a correction bias.

The bias balances the experts' load: it counts for the choice, not for the weights. Layers for multi-token prediction
are not used. Hub checkpoints store matrices as FP8 with a scale per 128 x 128 block.
"""

from shared.models.families import deepseek_v2
from shared.models.families.common import LAYER, Family, first_dense, layers, model, router, stored
from shared.models.families.settings import Settings
from shared.models.spec import ModelSpec, RouterSpec

CORRECTION = stored({"router_correction": LAYER + "mlp.gate.e_score_correction_bias"})
NAMES = {**deepseek_v2.NAMES, **CORRECTION}


def corrected_router(c: Settings) -> RouterSpec:
    """Section 2.1.2 of the paper; a group is worth its two best experts."""
    gate = router(
        c,
        score="sigmoid",
        correction=True,
        normalise=c.flag("norm_topk_prob"),
        scale=c.number("routed_scaling_factor"),
        groups=c.count("n_group"),
        top_groups=c.count("topk_group"),
        group_score="top2",
    )
    if gate.experts % gate.groups or gate.top_groups > gate.groups:
        raise c.error("n_group", gate.groups, f"a divisor of {gate.experts} experts, and at least topk_group")
    return gate


def describe(c: Settings) -> ModelSpec:
    c.only("scoring_func", None, "sigmoid")
    c.only("topk_method", None, "noaux_tc")
    c.only("moe_layer_freq", None, 1)
    inner = c.count("moe_intermediate_size")
    return model(
        c,
        NAMES,
        layers(c, deepseek_v2.latent_attention(c, interleaved=c.flag("rope_interleave")), dense=first_dense(c)),
        corrected_router(c),
        expert_hidden=inner,
        shared_hidden=inner * c.count("n_shared_experts"),
    )


DEFAULTS = {
    "first_k_dense_replace": 3,
    "n_group": 8,
    "n_shared_experts": 1,
    "norm_topk_prob": True,
    "q_lora_rank": 1536,
    "rms_norm_eps": 1e-6,
    "rope_interleave": True,
    "routed_scaling_factor": 2.5,
    "topk_group": 4,
}
FAMILY = Family(describe, DEFAULTS)
