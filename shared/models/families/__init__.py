"""config.json -> ModelSpec. Each file describes one family, to be checked against its paper. Reads no files."""

from collections.abc import Mapping
from typing import Any

from shared.errors import UnsupportedModel
from shared.models.families import (
    deepseek_v2,
    deepseek_v3,
    glm4_moe,
    gpt_oss,
    granitemoe,
    llama4,
    mixtral,
    olmoe,
    phimoe,
    qwen2_moe,
    qwen3_moe,
)
from shared.models.families.common import DEFAULTS, Family
from shared.models.families.settings import Settings
from shared.models.spec import ModelSpec

FAMILIES: Mapping[str, Family] = {
    "deepseek_v2": deepseek_v2.FAMILY,
    "deepseek_v3": deepseek_v3.FAMILY,
    "glm4_moe": glm4_moe.FAMILY,
    "gpt_oss": gpt_oss.FAMILY,
    "granitemoe": granitemoe.FAMILY,
    "llama4": llama4.FAMILY,
    "llama4_text": llama4.FAMILY,
    "mixtral": mixtral.FAMILY,
    "olmoe": olmoe.FAMILY,
    "phimoe": phimoe.FAMILY,
    "qwen2_moe": qwen2_moe.FAMILY,
    "qwen3_moe": qwen3_moe.FAMILY,
}


def parse_config(config: Mapping[str, Any], generation: Mapping[str, Any], where: str) -> ModelSpec:
    """Turn config.json (and generation_config.json, {} if there is none) into a ModelSpec.

    Raises UnsupportedModel for a healthy config that asks for what is not implemented, ModelError for a broken one.
    ``where`` is the path that errors name.
    """
    kind = config.get("model_type")
    family = FAMILIES.get(kind) if isinstance(kind, str) else None
    if family is None:
        supported = ", ".join(sorted(FAMILIES))
        raise UnsupportedModel(where, f"model_type {kind!r} is not supported; supported: {supported}")
    text = Settings(where, config).part("text_config").values
    eos = Settings(where, generation).counts("eos_token_id")  # more specific than config.json
    c = Settings(where, {**DEFAULTS, **family.defaults, **config, **text, "model_type": kind})
    _check_packing(c, family)
    return family.describe(Settings(where, {**c.values, "eos_token_id": eos}) if eos else c)


def _check_packing(c: Settings, family: Family) -> None:
    packed = c.part("quantization_config")
    method = packed.get("quant_method")
    if packed.values and method not in family.packings:
        readable = ", ".join(family.packings)
        problem = f"checkpoints quantised by {method!r} are not supported (quantization_config); supported: {readable}"
        raise UnsupportedModel(c.where, problem)
