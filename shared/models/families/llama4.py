"""Llama 4 (Meta, 2025): three layers in four rotate positions within chunks, the fourth sees all without positions.

Queries and keys are L2-normed after the rotation; queries of layers without positions are scaled at far positions
(arXiv 2501.19399). The top expert reads the row times the sigmoid of its score; a shared expert reads it as it is.
Hub checkpoints put this model under ``text_config`` and "language_model."; their vision part is not used.
"""

from dataclasses import replace

from shared.models.families.common import (
    LAYER,
    LLAMA,
    Family,
    Names,
    feed_forward,
    grouped_attention,
    layers,
    model,
    router,
    stored,
)
from shared.models.families.settings import Settings
from shared.models.spec import AttentionSpec, ModelSpec, Stored, Temperature

_FFN = LAYER + "feed_forward."
_EXPERTS = {
    "expert_gate": Stored(_FFN + "experts.gate_up_proj", stacked=True, transposed=True, part="first"),
    "expert_up": Stored(_FFN + "experts.gate_up_proj", stacked=True, transposed=True, part="second"),
    "expert_down": Stored(_FFN + "experts.down_proj", stacked=True, transposed=True),
}
NAMES: Names = {
    **LLAMA,
    **_EXPERTS,
    **stored({"router": _FFN + "router.weight"}),
    **feed_forward("shared", "feed_forward.shared_expert."),
    **feed_forward("dense", "feed_forward."),
}


def describe(c: Settings) -> ModelSpec:
    hub = c.get("model_type") == "llama4"
    names = {role: replace(s, name="language_model." + s.name) for role, s in NAMES.items()} if hub else NAMES
    moe = _moe_layers(c)
    return model(
        c,
        names,
        layers(c, lambda index: _attention(c, index), dense=lambda index: index not in moe),
        router(c, score="top_sigmoid", normalise=False, weighs_input=True),
        expert_hidden=c.count("intermediate_size"),
        dense_hidden=c.count("intermediate_size_mlp"),
        shared_hidden=c.count("intermediate_size"),
    )


def _moe_layers(c: Settings) -> tuple[int, ...]:
    step = c.count("interleave_moe_layer_step")
    every = range(step - 1, c.count("num_hidden_layers"), step)
    return tuple(every) if c.get("moe_layers") is None else c.counts("moe_layers")


def _attention(c: Settings, index: int) -> AttentionSpec:
    listed = c.counts("no_rope_layers")  # 1 where there IS a rotation; empty means every fourth has none
    rotates = listed[index] == 1 if len(listed) > index else (index + 1) % c.count("no_rope_layer_interval") != 0
    chunked = c.get("attention_chunk_size") is not None and _is_chunked(c, index, rotates)
    tuned = not rotates and bool(c.get("attn_temperature_tuning"))
    attention = grouped_attention(
        c,
        interleaved=True,
        qk_norm="l2" if rotates and c.flag("use_qk_norm") else "",
        chunk=c.count("attention_chunk_size") if chunked else 0,
        temperature=Temperature(c.number("attn_scale"), c.number("floor_scale")) if tuned else None,
    )
    return attention if rotates else replace(attention, rope=None)


def _is_chunked(c: Settings, index: int, rotates: bool) -> bool:
    if c.get("layer_types") is None:
        return rotates
    return c.words("layer_types", c.count("num_hidden_layers"))[index] == "chunked_attention"


DEFAULTS = {
    "attention_chunk_size": 8192,
    "attn_scale": 0.1,
    "attn_temperature_tuning": True,
    "floor_scale": 8192,
    "head_dim": 128,
    "interleave_moe_layer_step": 1,
    "no_rope_layer_interval": 4,
    "num_experts_per_tok": 1,
    "num_local_experts": 16,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500_000.0,
    "use_qk_norm": True,
}
FAMILY = Family(describe, DEFAULTS)
