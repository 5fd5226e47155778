"""Tiny random checkpoints of every family, made and written by transformers itself; and the form that hubs have."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers as tf
from transformers import AutoModelForCausalLM, PreTrainedConfig

from shared.models.source import DEMO

SHAPE: dict[str, Any] = {
    "vocab_size": 97,
    "hidden_size": 40,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "num_experts_per_tok": 3,
    "bos_token_id": None,
    "eos_token_id": 0,
    "pad_token_id": None,
}
"""7 or 8 experts, top-3, heads that are not hidden / heads wide: nothing is a power of two by accident."""
_MLA = {
    "num_key_value_heads": 4,
    "intermediate_size": 56,
    "moe_intermediate_size": 24,
    "n_routed_experts": 8,
    "first_k_dense_replace": 1,
    "kv_lora_rank": 16,
    "q_lora_rank": 20,
    "qk_nope_head_dim": 12,
    "qk_rope_head_dim": 8,
    "v_head_dim": 10,
}
_OWN: dict[str, tuple[type[PreTrainedConfig], dict[str, Any]]] = {
    "mixtral": (tf.MixtralConfig, {"intermediate_size": 24, "num_local_experts": 7}),
    "qwen2_moe": (
        tf.Qwen2MoeConfig,
        {
            "intermediate_size": 56,
            "moe_intermediate_size": 24,
            "shared_expert_intermediate_size": 32,
            "num_experts": 7,
        },
    ),
    "qwen3_moe": (
        tf.Qwen3MoeConfig,
        {
            "intermediate_size": 56,
            "moe_intermediate_size": 24,
            "num_local_experts": 7,
            "head_dim": 24,
            "norm_topk_prob": True,
        },
    ),
    "olmoe": (tf.OlmoeConfig, {"intermediate_size": 24, "num_experts": 7}),
    "deepseek_v2": (
        tf.DeepseekV2Config,
        _MLA | {"topk_method": "group_limited_greedy", "n_group": 4, "topk_group": 2, "routed_scaling_factor": 1.5},
    ),
    "deepseek_v3": (tf.DeepseekV3Config, _MLA | {"n_group": 4, "topk_group": 2}),
    "phimoe": (
        tf.PhimoeConfig,
        {
            "intermediate_size": 24,
            "num_local_experts": 7,
            "num_experts_per_tok": 2,
            "attention_bias": True,
            "lm_head_bias": True,
        },
    ),
    "llama4_text": (
        tf.Llama4TextConfig,
        {
            "intermediate_size": 24,
            "intermediate_size_mlp": 56,
            "num_local_experts": 7,
            "num_experts_per_tok": 1,
            "head_dim": 12,
            "attention_chunk_size": 11,
            "floor_scale": 7,
            "no_rope_layer_interval": 2,
            "rope_parameters": {
                "rope_type": "llama3",
                "rope_theta": 1000.0,
                "factor": 4.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 32,
            },
        },
    ),
    "gpt_oss": (
        tf.GptOssConfig,
        {
            "intermediate_size": 32,
            "hidden_size": 64,
            "num_local_experts": 7,
            "head_dim": 12,
            "sliding_window": 9,
            "rope_parameters": {
                "rope_type": "yarn",
                "rope_theta": 1000.0,
                "factor": 4.0,
                "beta_fast": 32.0,
                "beta_slow": 1.0,
                "truncate": False,
                "original_max_position_embeddings": 32,
            },
        },
    ),
    "glm4_moe": (
        tf.Glm4MoeConfig,
        {
            "intermediate_size": 56,
            "moe_intermediate_size": 24,
            "n_routed_experts": 8,
            "head_dim": 12,
            "use_qk_norm": True,
            "attention_bias": True,
            "n_group": 2,
            "routed_scaling_factor": 1.7,
        },
    ),
    "granitemoe": (
        tf.GraniteMoeConfig,
        {
            "intermediate_size": 24,
            "num_local_experts": 7,
            "embedding_multiplier": 3.0,
            "logits_scaling": 0.5,
            "residual_multiplier": 0.4,
            "attention_multiplier": 0.3,
        },
    ),
}
FAMILIES = tuple(_OWN)


def config(family: str, **changes: Any) -> PreTrainedConfig:
    """A tiny config of a family (its ``model_type``)."""
    kind, own = _OWN[family]
    return kind(**{**SHAPE, **own, **changes})


def load_yardstick(path: Path) -> Any:
    """transformers' own model of a checkpoint, in fp32."""
    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, attn_implementation="eager").eval()


def save_random(
    config: PreTrainedConfig, path: Path, shard_size: str = "5GB", dtype: torch.dtype = torch.float32
) -> None:
    """Weights with sane activations and norms that are not one, written by transformers itself."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    randomise(model)
    model.to(dtype).save_pretrained(path, max_shard_size=shard_size)
    shutil.copy(DEMO / "tokenizer.json", path)


def randomise(model: Any) -> None:
    """Matrices keep the variance of their input, vectors scatter: around one where they are factors."""
    transposed = model.config.model_type in ("gpt_oss", "llama4_text", "llama4")
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if tensor.dim() == 1 and "inv_freq" in name:
            continue
        noise = torch.randn_like(tensor)
        factor = tensor.dim() == 1 and name.endswith("weight")
        inputs = tensor.shape[1] if tensor.dim() == 3 and transposed else tensor.shape[-1]
        if "bias" in name or tensor.dim() == 1:
            tensor.data = 1 + 0.2 * noise if factor else 0.3 * noise
        else:
            tensor.data = noise * inputs**-0.5


def to_transformers_4_form(path: Path) -> None:
    """config.json as the hub has it: rope_theta and rope_scaling beside each other, older names of keys."""
    values = json.loads((path / "config.json").read_text())
    rope = values.pop("rope_parameters")
    values |= {"rope_theta": rope.pop("rope_theta"), "torch_dtype": values.pop("dtype")}
    if "partial_rotary_factor" in rope:
        values["partial_rotary_factor"] = rope.pop("partial_rotary_factor")
    kind = rope.pop("rope_type")
    values["rope_scaling"] = None if kind == "default" else {"type": kind, **rope}
    for change in _OLD_FORM.get(values["model_type"], ()):
        change(values)
    (path / "config.json").write_text(json.dumps(values))


def _rename(new: str, old: str) -> Callable[[dict[str, Any]], None]:
    def change(values: dict[str, Any]) -> None:
        values[old] = values.pop(new)

    return change


def _drop(*keys: str) -> Callable[[dict[str, Any]], None]:
    def change(values: dict[str, Any]) -> None:
        for key in keys:
            values.pop(key, None)

    return change


_OLD_FORM: dict[str, tuple[Callable[[dict[str, Any]], None], ...]] = {
    "qwen3_moe": (_rename("num_local_experts", "num_experts"),),
    "qwen2_moe": (_drop("layer_types", "qkv_bias"),),
    "deepseek_v2": (_drop("qk_head_dim", "head_dim"), lambda v: v.update(scoring_func="softmax", moe_layer_freq=1)),
    "deepseek_v3": (
        _drop("qk_head_dim", "head_dim"),
        lambda v: v["rope_interleave"] and v.pop("rope_interleave"),
        lambda v: v.update(scoring_func="sigmoid", moe_layer_freq=1, topk_method="noaux_tc"),
    ),
    "llama4_text": (_drop("layer_types", "moe_layers"),),
    "gpt_oss": (_drop("swiglu_alpha"),),
}
