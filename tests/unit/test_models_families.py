"""config.json of both transformers forms -> ModelSpec, and what is refused with which words."""

import json

import pytest

from shared.errors import ModelError, UnsupportedModel
from shared.models.families import parse_config
from shared.models.layout import expected_tensors, tensor_name
from shared.models.presets import PRESETS
from shared.models.source import DEMO

# The config of Qwen/Qwen3-30B-A3B as the hub has it (transformers 4 form).
QWEN3_HUB = json.loads("""{
  "architectures": ["Qwen3MoeForCausalLM"], "attention_bias": false, "attention_dropout": 0.0, "bos_token_id": 151643,
  "decoder_sparse_step": 1, "eos_token_id": 151645, "head_dim": 128, "hidden_act": "silu", "hidden_size": 2048,
  "initializer_range": 0.02, "intermediate_size": 6144, "max_position_embeddings": 40960, "max_window_layers": 48,
  "mlp_only_layers": [], "model_type": "qwen3_moe", "moe_intermediate_size": 768, "norm_topk_prob": true,
  "num_attention_heads": 32, "num_experts": 128, "num_experts_per_tok": 8, "num_hidden_layers": 48,
  "num_key_value_heads": 4, "output_router_logits": false, "rms_norm_eps": 1e-06, "rope_scaling": null,
  "rope_theta": 1000000.0, "router_aux_loss_coef": 0.001, "sliding_window": null, "tie_word_embeddings": false,
  "torch_dtype": "bfloat16", "transformers_version": "4.51.0", "use_cache": true, "use_sliding_window": false,
  "vocab_size": 151936}""")

# The config of mistralai/Mixtral-8x7B-v0.1 as the hub has it.
MIXTRAL_HUB = json.loads("""{
  "architectures": ["MixtralForCausalLM"], "attention_dropout": 0.0, "bos_token_id": 1, "eos_token_id": 2,
  "hidden_act": "silu", "hidden_size": 4096, "initializer_range": 0.02, "intermediate_size": 14336,
  "max_position_embeddings": 32768, "model_type": "mixtral", "num_attention_heads": 32, "num_experts_per_tok": 2,
  "num_hidden_layers": 32, "num_key_value_heads": 8, "num_local_experts": 8, "output_router_logits": false,
  "rms_norm_eps": 1e-05, "rope_theta": 1000000.0, "router_aux_loss_coef": 0.02, "sliding_window": null,
  "tie_word_embeddings": false, "torch_dtype": "bfloat16", "use_cache": true, "vocab_size": 32000}""")


def rope_of(spec):
    rope = spec.layers[0].attention.rope
    assert rope is not None
    return rope


def parse(config, **changes):
    return parse_config(config | changes, {}, "config.json")


def test_qwen3_hub_config():
    spec = parse(QWEN3_HUB)
    attention = spec.layers[0].attention
    assert (spec.family, spec.vocab_size, spec.hidden, spec.expert_hidden) == ("qwen3_moe", 151936, 2048, 768)
    assert (attention.heads, attention.kv_heads, attention.head_dim, attention.qk_norm) == (32, 4, 128, "head")
    assert (rope_of(spec).theta, rope_of(spec).dim, rope_of(spec).kind) == (1e6, 128, "default")
    assert (spec.router.experts, spec.router.top_k, spec.router.normalise) == (128, 8, True)
    assert (spec.moe_layers, spec.eos_ids, attention.window) == (tuple(range(48)), (151645,), 0)
    assert sum(1 for _ in expected_tensors(spec)) == 18867  # what the hub's index lists


def test_mixtral_hub_config():
    spec = parse(MIXTRAL_HUB)
    attention = spec.layers[0].attention
    assert (spec.expert_hidden, spec.norm_eps, spec.router.normalise, attention.qk_norm) == (14336, 1e-5, True, "")
    assert (attention.head_dim, attention.scale, rope_of(spec).theta) == (128, 128**-0.5, 1e6)
    assert tensor_name(spec, "expert_up", 3, 5) == "model.layers.3.block_sparse_moe.experts.5.w3.weight"
    assert sum(1 for _ in expected_tensors(spec)) == 995  # what the hub's index lists


def test_transformers_5_form_means_the_same():
    new = {k: v for k, v in QWEN3_HUB.items() if k not in ("num_experts", "rope_theta", "rope_scaling")}
    new |= {"num_local_experts": 128, "rope_parameters": {"rope_theta": 1000000.0, "rope_type": "default"}}
    assert parse(new) == parse(QWEN3_HUB)


def test_keys_that_are_left_out_mean_what_transformers_assumes():
    keep = {k: v for k, v in QWEN3_HUB.items() if k not in ("norm_topk_prob", "rope_theta", "head_dim", "hidden_act")}
    spec = parse(keep)
    assert spec.router.normalise is False
    assert (rope_of(spec).theta, spec.layers[0].attention.head_dim) == (10_000.0, 64)
    assert rope_of(parse({k: v for k, v in MIXTRAL_HUB.items() if k != "rope_theta"})).theta == 1e6


def test_dense_layers_by_list_and_by_step():
    assert parse(QWEN3_HUB, num_hidden_layers=4, mlp_only_layers=[0, 2]).moe_layers == (1, 3)
    assert parse(QWEN3_HUB, num_hidden_layers=5, decoder_sparse_step=2).moe_layers == (1, 3)
    assert parse(QWEN3_HUB, num_hidden_layers=2, mlp_only_layers=None).moe_layers == (0, 1)
    names = {t.name: t.shape for t in expected_tensors(parse(QWEN3_HUB, num_hidden_layers=2, mlp_only_layers=[0]))}
    assert names["model.layers.0.mlp.gate_proj.weight"] == (6144, 2048)
    assert "model.layers.0.mlp.gate.weight" not in names


def test_windows_biases_and_linear_rope():
    assert parse(MIXTRAL_HUB, sliding_window=4096).layers[0].attention.window == 4096
    assert parse(QWEN3_HUB, sliding_window=4096).layers[0].attention.window == 0
    assert parse(QWEN3_HUB, sliding_window=4096, use_sliding_window=True).layers[0].attention.window == 4096
    attention = parse(QWEN3_HUB, attention_bias=True).layers[0].attention
    assert attention.bias and attention.out_bias
    old = rope_of(parse(QWEN3_HUB, rope_scaling={"type": "linear", "factor": 4.0}))
    new = {"rope_type": "linear", "factor": 4.0, "rope_theta": 1e6}
    assert old == rope_of(parse(QWEN3_HUB, rope_parameters=new))
    assert (old.kind, old.scaling) == ("linear", {"factor": 4.0})


def test_end_of_sequence_ids_of_the_generation_config_win():
    assert parse_config(QWEN3_HUB, {"eos_token_id": [7, 8]}, "c").eos_ids == (7, 8)
    assert parse_config(QWEN3_HUB, {"eos_token_id": 0}, "c").eos_ids == (0,)
    assert parse_config(QWEN3_HUB, {"eos_token_id": None}, "c").eos_ids == (151645,)
    assert parse(QWEN3_HUB, eos_token_id=None).eos_ids == ()


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"model_type": "llama"}, ["llama", "mixtral, olmoe", "qwen3_moe"]),
        ({"model_type": None}, ["None", "mixtral, olmoe", "qwen3_moe"]),
        ({"model_type": ["x"]}, ["mixtral, olmoe", "qwen3_moe"]),
        ({"hidden_act": "relu"}, ["hidden_act", "relu", "silu"]),
        ({"rope_scaling": {"rope_type": "dynamic", "factor": 4}}, ["dynamic", "default, linear, llama3"]),
        ({"rope_parameters": {"type": "mrope"}}, ["mrope"]),
        ({"quantization_config": {"quant_method": "awq"}}, ["quantization_config", "awq", "fp8"]),
        ({"quantization_config": {"quant_method": "mxfp4"}}, ["mxfp4"]),
        ({"quantization_config": {"quant_method": "fp8"}}, ["weight_block_size"]),
        ({"mlp_only_layers": list(range(48))}, ["no layer has routed experts"]),
    ],
)
def test_what_is_not_implemented_is_refused_by_name(changes, words):
    with pytest.raises(UnsupportedModel) as caught:
        parse(QWEN3_HUB, **changes)
    assert all(word in str(caught.value) for word in ["config.json", *words])


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"hidden_size": None}, ["hidden_size is missing"]),
        ({"hidden_size": "2048"}, ["hidden_size", "'2048'"]),
        ({"num_hidden_layers": 0}, ["num_hidden_layers", "0"]),
        ({"num_experts": None}, ["num_local_experts or num_experts or n_routed_experts is missing"]),
        ({"num_experts_per_tok": 129}, ["num_experts_per_tok is 129", "128 experts"]),
        ({"num_key_value_heads": 5}, ["num_key_value_heads is 5", "32"]),
        ({"head_dim": 63}, ["head_dim", "even"]),
        ({"rms_norm_eps": 0}, ["rms_norm_eps"]),
        ({"rope_theta": float("nan")}, ["rope_theta"]),
        ({"rope_parameters": [1]}, ["rope_parameters"]),
        ({"rope_scaling": {"type": "linear"}}, ["factor is missing"]),
        ({"rope_scaling": {"type": "llama3", "factor": 8}}, ["low_freq_factor is missing"]),
        ({"rope_scaling": {"type": "longrope", "short_factor": [1.0]}}, ["short_factor", "64 numbers"]),
        ({"partial_rotary_factor": 0.01}, ["partial_rotary_factor"]),
        ({"norm_topk_prob": 1}, ["norm_topk_prob", "true or false"]),
        ({"eos_token_id": "x"}, ["eos_token_id"]),
        ({"mlp_only_layers": "all"}, ["mlp_only_layers"]),
    ],
)
def test_broken_values_are_refused_with_file_and_key(changes, words):
    with pytest.raises(ModelError) as caught:
        parse(QWEN3_HUB, **changes)
    assert not isinstance(caught.value, UnsupportedModel)
    assert all(word in str(caught.value) for word in ["config.json", *words])


@pytest.mark.parametrize("config", [*PRESETS.values(), json.loads((DEMO / "config.json").read_text())])
def test_presets_and_demo_are_understood(config):
    assert parse_config(config, {}, "config.json").moe_layers
