"""What hubs publish, understood: the configs of real checkpoints, and the number of parameters in them."""

import math
from typing import Any

import pytest

from shared.models.families import parse_config
from shared.models.layout import expected_tensors
from shared.models.spec import ModelSpec

YARN: dict[str, Any] = {"type": "yarn", "beta_fast": 32, "beta_slow": 1, "factor": 40}
MLA: dict[str, Any] = {
    "attention_bias": False,
    "hidden_act": "silu",
    "kv_lora_rank": 512,
    "max_position_embeddings": 163840,
    "moe_layer_freq": 1,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000,
    "tie_word_embeddings": False,
    "v_head_dim": 128,
}
FP8 = {"activation_scheme": "dynamic", "fmt": "e4m3", "quant_method": "fp8", "weight_block_size": [128, 128]}
HUB: dict[str, tuple[dict[str, Any], float]] = {
    "Qwen/Qwen1.5-MoE-A2.7B": (
        {
            "model_type": "qwen2_moe",
            "hidden_act": "silu",
            "hidden_size": 2048,
            "intermediate_size": 5632,
            "max_position_embeddings": 8192,
            "max_window_layers": 21,
            "num_attention_heads": 16,
            "num_hidden_layers": 24,
            "num_key_value_heads": 16,
            "rms_norm_eps": 1e-6,
            "rope_theta": 1000000.0,
            "sliding_window": 32768,
            "tie_word_embeddings": False,
            "use_sliding_window": False,
            "vocab_size": 151936,
            "decoder_sparse_step": 1,
            "moe_intermediate_size": 1408,
            "shared_expert_intermediate_size": 5632,
            "num_experts_per_tok": 4,
            "num_experts": 60,
            "norm_topk_prob": False,
        },
        14.316e9,
    ),
    "allenai/OLMoE-1B-7B-0924": (
        {
            "model_type": "olmoe",
            "attention_bias": False,
            "clip_qkv": None,
            "hidden_act": "silu",
            "hidden_size": 2048,
            "intermediate_size": 1024,
            "max_position_embeddings": 4096,
            "norm_topk_prob": False,
            "num_attention_heads": 16,
            "num_experts": 64,
            "num_experts_per_tok": 8,
            "num_hidden_layers": 16,
            "num_key_value_heads": 16,
            "rms_norm_eps": 1e-5,
            "rope_scaling": None,
            "rope_theta": 10000.0,
            "tie_word_embeddings": False,
            "vocab_size": 50304,
        },
        6.919e9,
    ),
    "deepseek-ai/DeepSeek-V2-Lite": (
        MLA
        | {
            "model_type": "deepseek_v2",
            "first_k_dense_replace": 1,
            "hidden_size": 2048,
            "intermediate_size": 10944,
            "moe_intermediate_size": 1408,
            "n_group": 1,
            "n_routed_experts": 64,
            "n_shared_experts": 2,
            "norm_topk_prob": False,
            "num_attention_heads": 16,
            "num_experts_per_tok": 6,
            "num_hidden_layers": 27,
            "num_key_value_heads": 16,
            "q_lora_rank": None,
            "rope_scaling": YARN | {"mscale": 0.707, "mscale_all_dim": 0.707, "original_max_position_embeddings": 4096},
            "routed_scaling_factor": 1.0,
            "scoring_func": "softmax",
            "topk_group": 1,
            "topk_method": "greedy",
            "vocab_size": 102400,
        },
        15.706e9,
    ),
    "deepseek-ai/DeepSeek-R1": (
        MLA
        | {
            "model_type": "deepseek_v3",
            "first_k_dense_replace": 3,
            "hidden_size": 7168,
            "intermediate_size": 18432,
            "moe_intermediate_size": 2048,
            "n_group": 8,
            "n_routed_experts": 256,
            "n_shared_experts": 1,
            "norm_topk_prob": True,
            "num_attention_heads": 128,
            "num_experts_per_tok": 8,
            "num_hidden_layers": 61,
            "num_key_value_heads": 128,
            "num_nextn_predict_layers": 1,
            "q_lora_rank": 1536,
            "quantization_config": FP8,
            "rope_scaling": YARN | {"mscale": 1.0, "mscale_all_dim": 1.0, "original_max_position_embeddings": 4096},
            "routed_scaling_factor": 2.5,
            "scoring_func": "sigmoid",
            "topk_group": 4,
            "topk_method": "noaux_tc",
            "vocab_size": 129280,
        },
        671.026e9,
    ),
    "microsoft/Phi-3.5-MoE-instruct": (
        {
            "model_type": "phimoe",
            "attention_bias": True,
            "hidden_act": "silu",
            "hidden_size": 4096,
            "intermediate_size": 6400,
            "lm_head_bias": True,
            "max_position_embeddings": 131072,
            "num_attention_heads": 32,
            "num_experts_per_tok": 2,
            "num_hidden_layers": 32,
            "num_key_value_heads": 8,
            "num_local_experts": 16,
            "original_max_position_embeddings": 4096,
            "rms_norm_eps": 1e-5,
            "rope_scaling": {
                "type": "longrope",
                "long_factor": [1.0 + i for i in range(64)],
                "long_mscale": 1.243163121016122,
                "original_max_position_embeddings": 4096,
                "short_factor": [1.0] * 64,
                "short_mscale": 1.243163121016122,
            },
            "rope_theta": 10000.0,
            "router_jitter_noise": 0.01,
            "sliding_window": 131072,
            "tie_word_embeddings": False,
            "vocab_size": 32064,
        },
        41.873e9,
    ),
    "meta-llama/Llama-4-Scout-17B-16E": (
        {
            "model_type": "llama4",
            "text_config": {
                "model_type": "llama4_text",
                "attention_bias": False,
                "attention_chunk_size": 8192,
                "attn_scale": 0.1,
                "attn_temperature_tuning": True,
                "floor_scale": 8192,
                "head_dim": 128,
                "hidden_act": "silu",
                "hidden_size": 5120,
                "interleave_moe_layer_step": 1,
                "intermediate_size": 8192,
                "intermediate_size_mlp": 16384,
                "max_position_embeddings": 10485760,
                "no_rope_layers": [],
                "num_attention_heads": 40,
                "num_experts_per_tok": 1,
                "num_hidden_layers": 48,
                "num_key_value_heads": 8,
                "num_local_experts": 16,
                "rms_norm_eps": 1e-5,
                "rope_scaling": {
                    "factor": 8.0,
                    "high_freq_factor": 4.0,
                    "low_freq_factor": 1.0,
                    "original_max_position_embeddings": 8192,
                    "rope_type": "llama3",
                },
                "rope_theta": 500000.0,
                "use_qk_norm": True,
                "vocab_size": 202048,
            },
            "vision_config": {"model_type": "llama4_vision_model"},
        },
        107.770e9,
    ),
    "openai/gpt-oss-20b": (
        {
            "model_type": "gpt_oss",
            "attention_bias": True,
            "experts_per_token": 4,
            "head_dim": 64,
            "hidden_act": "silu",
            "hidden_size": 2880,
            "initial_context_length": 4096,
            "intermediate_size": 2880,
            "layer_types": ["sliding_attention", "full_attention"] * 12,
            "max_position_embeddings": 131072,
            "num_attention_heads": 64,
            "num_experts_per_tok": 4,
            "num_hidden_layers": 24,
            "num_key_value_heads": 8,
            "num_local_experts": 32,
            "quantization_config": {"modules_to_not_convert": ["lm_head"], "quant_method": "mxfp4"},
            "rms_norm_eps": 1e-5,
            "rope_scaling": {
                "beta_fast": 32.0,
                "beta_slow": 1.0,
                "factor": 32.0,
                "original_max_position_embeddings": 4096,
                "rope_type": "yarn",
                "truncate": False,
            },
            "rope_theta": 150000,
            "sliding_window": 128,
            "swiglu_limit": 7.0,
            "tie_word_embeddings": False,
            "vocab_size": 201088,
        },
        20.915e9,
    ),
    "zai-org/GLM-4.5-Air": (
        {
            "model_type": "glm4_moe",
            "attention_bias": True,
            "first_k_dense_replace": 1,
            "head_dim": 128,
            "hidden_act": "silu",
            "hidden_size": 4096,
            "intermediate_size": 10944,
            "max_position_embeddings": 131072,
            "moe_intermediate_size": 1408,
            "n_group": 1,
            "n_routed_experts": 128,
            "n_shared_experts": 1,
            "norm_topk_prob": True,
            "num_attention_heads": 96,
            "num_experts_per_tok": 8,
            "num_hidden_layers": 46,
            "num_key_value_heads": 8,
            "num_nextn_predict_layers": 1,
            "partial_rotary_factor": 0.5,
            "rms_norm_eps": 1e-5,
            "rope_scaling": None,
            "rope_theta": 1000000,
            "routed_scaling_factor": 1.0,
            "tie_word_embeddings": False,
            "topk_group": 1,
            "use_qk_norm": False,
            "vocab_size": 151552,
        },
        106.852e9,
    ),
}


def spec_of(name: str) -> ModelSpec:
    return parse_config(HUB[name][0], {}, name)


@pytest.mark.parametrize("name", HUB)
def test_the_number_of_parameters_is_the_published_one(name: str) -> None:
    total = 0
    for tensor in {t.name: t for t in expected_tensors(spec_of(name))}.values():
        packed = 2 if tensor.name.endswith("_blocks") else 0 if tensor.name.endswith("_scales") else 1
        total += packed * math.prod(tensor.shape)
    assert total == pytest.approx(HUB[name][1], rel=2e-4)


def test_deepseek_sharpens_scores_when_positions_are_scaled() -> None:
    lite, r1 = (spec_of(f"deepseek-ai/DeepSeek-{name}").layers[-1].attention for name in ("V2-Lite", "R1"))
    assert lite.scale == pytest.approx(192**-0.5 * (0.1 * 0.707 * math.log(40) + 1) ** 2)
    assert r1.scale == pytest.approx(192**-0.5 * 1.3688879**2)


def test_llama_4_alternates_chunks_and_layers_without_positions() -> None:
    layers = [layer.attention for layer in spec_of("meta-llama/Llama-4-Scout-17B-16E").layers[:4]]
    assert [a.chunk for a in layers] == [8192, 8192, 8192, 0]
    assert [a.rope is None for a in layers] == [a.temperature is not None for a in layers] == [False] * 3 + [True]
    assert [a.qk_norm for a in layers] == ["l2"] * 3 + [""]


def test_gpt_oss_alternates_windows() -> None:
    assert [layer.attention.window for layer in spec_of("openai/gpt-oss-20b").layers[:3]] == [128, 0, 128]
