"""One process, no mesh: Decoder and MoeLayer against transformers on one checkpoint, in chunks over a paged cache."""

from pathlib import Path
from typing import Any

import pytest
import torch

from shared.kernels.base import select_kernels
from shared.kernels.reference import ReferenceKernels
from shared.models.decoder import KvCache, StepInput
from shared.models.loader import open_checkpoint
from shared.models.local import LocalModel
from shared.models.presets import make_checkpoint
from shared.models.source import DEMO
from tests.parity.families import FAMILIES, config, load_yardstick, save_random, to_transformers_4_form

TOLERANCE = 1e-4
CPU = torch.device("cpu")
LENGTHS = (37, 5, 64)
"""Beyond every window and chunk of the tiny models, and across their limits."""

LINEAR = {"rope_type": "linear", "factor": 3.0, "rope_theta": 5000.0}
YARN = {"rope_type": "yarn", "factor": 4.0, "rope_theta": 500.0, "original_max_position_embeddings": 32}
SHARP = YARN | {"mscale": 1.0, "mscale_all_dim": 0.7}
HALVES = {"short_factor": [1.0, 1.5, 2.0, 3.0, 4.0], "long_factor": [1.0, 2.0, 4.0, 8.0, 16.0]}
LONG = {"rope_type": "longrope", "rope_theta": 500.0, "short_mscale": 1.1, "long_mscale": 1.3}
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen3 tied, biased, dense layer": (
        "qwen3_moe",
        {"tie_word_embeddings": True, "attention_bias": True, "mlp_only_layers": [1]},
    ),
    "qwen3 top-k weights as they are": ("qwen3_moe", {"norm_topk_prob": False}),
    "qwen3 sparse step, linear rope": ("qwen3_moe", {"decoder_sparse_step": 2, "rope_parameters": LINEAR}),
    "qwen3 sliding window, yarn": (
        "qwen3_moe",
        {"use_sliding_window": True, "sliding_window": 9, "rope_parameters": YARN},
    ),
    "mixtral head size, one kv head": ("mixtral", {"num_key_value_heads": 1, "head_dim": 6}),
    "mixtral tied, gelu": ("mixtral", {"tie_word_embeddings": True, "hidden_act": "gelu"}),
    "mixtral tanh gelu": ("mixtral", {"hidden_act": "gelu_pytorch_tanh"}),
    "mixtral sliding window, top-1": ("mixtral", {"num_experts_per_tok": 1, "sliding_window": 7}),
    "qwen2 windows, dense layer, normalised": (
        "qwen2_moe",
        {"use_sliding_window": True, "sliding_window": 9, "max_window_layers": 2, "mlp_only_layers": [1]}
        | {"norm_topk_prob": True, "num_hidden_layers": 4},
    ),
    "olmoe clipped, one head each": ("olmoe", {"clip_qkv": 0.8, "num_key_value_heads": 4, "norm_topk_prob": True}),
    "deepseek_v2 greedy, direct queries, biased": (
        "deepseek_v2",
        {"topk_method": "greedy", "q_lora_rank": None, "attention_bias": True},
    ),
    "deepseek_v2 yarn": ("deepseek_v2", {"rope_parameters": SHARP, "first_k_dense_replace": 0}),
    "deepseek_v3 yarn, biased": ("deepseek_v3", {"rope_parameters": SHARP, "attention_bias": True}),
    "deepseek_v3 half-split, not normalised": ("deepseek_v3", {"norm_topk_prob": False, "rope_interleave": False}),
    "phimoe longrope": (
        "phimoe",
        {"rope_parameters": LONG | HALVES | {"original_max_position_embeddings": 64}, "lm_head_bias": False},
    ),
    "phimoe window, no bias": ("phimoe", {"sliding_window": 7, "attention_bias": False}),
    "llama4 no norm, interleaved": (
        "llama4_text",
        {"use_qk_norm": False, "interleave_moe_layer_step": 2, "num_hidden_layers": 4},
    ),
    "llama4 top-2, no temperature, biased": (
        "llama4_text",
        {"num_experts_per_tok": 2, "attn_temperature_tuning": False, "attention_bias": True},
    ),
    "gpt_oss one window": ("gpt_oss", {"layer_types": ["full_attention", "sliding_attention", "full_attention"]}),
    "glm4 plain": ("glm4_moe", {"use_qk_norm": False, "attention_bias": False, "n_group": 1}),
    "granite tied, biased": ("granitemoe", {"tie_word_embeddings": True, "attention_bias": True}),
}
CONFIGS = {family: (family, {}) for family in FAMILIES} | VARIANTS


def paged_logits(path: Path, sequences: list[torch.Tensor], chunk: int, prompt: int, kernels) -> list[torch.Tensor]:
    """Logits of every position: ``prompt`` tokens in chunks, the rest one by one; all sequences in the same steps."""
    checkpoint = open_checkpoint(str(path))
    model = LocalModel(checkpoint, kernels, CPU, torch.float32, max_positions=max(map(len, sequences)))
    block_size, blocks = 4, sum(len(s) // 4 + 1 for s in sequences) + 3
    cache = model.decoder.new_cache(blocks, block_size)
    free = torch.randperm(blocks, generator=torch.Generator().manual_seed(1), dtype=torch.int32)
    width = max(len(s) for s in sequences) // block_size + 1
    tables = torch.zeros(len(sequences), width, dtype=torch.int32)
    for row, sequence in enumerate(sequences):
        count = len(sequence) // block_size + 1
        tables[row, :count], free = free[:count], free[count:]
    done, results = [0] * len(sequences), [[] for _ in sequences]
    while any(d < len(s) for d, s in zip(done, sequences, strict=True)):
        spans = [(d, min(d + (chunk if d < prompt else 1), len(s))) for d, s in zip(done, sequences, strict=True)]
        for row, logits in enumerate(one_step(model, cache, sequences, spans, tables, block_size)):
            results[row].append(logits)
        done = [end for _, end in spans]
    return [torch.cat(r) for r in results]


def one_step(model: LocalModel, cache: KvCache, sequences, spans, tables, block_size):
    counts = [end - start for start, end in spans]
    positions = torch.cat([torch.arange(*span) for span in spans])
    sequence = torch.arange(len(spans)).repeat_interleave(torch.tensor(counts))
    blocks = tables[sequence, positions // block_size].long()
    step = StepInput(
        tokens=torch.cat([s[slice(*span)] for s, span in zip(sequences, spans, strict=True)]),
        positions=positions.int(),
        slots=blocks * block_size + positions % block_size,
        sequence=sequence.int(),
        tables=tables,
        logit_rows=torch.arange(len(positions)),
    )
    return model.forward(step, cache).split(counts)


def largest_difference(path: Path, kernels, chunk=8, prompt=24, lengths=LENGTHS, yardstick=None) -> float:
    """Of logits, from those of transformers (or of ``yardstick``) on the same checkpoint; greedy tokens are equal."""
    yardstick = load_yardstick(path) if yardstick is None else yardstick
    generator = torch.Generator().manual_seed(2)
    sequences = [torch.randint(yardstick.config.vocab_size, (n,), generator=generator) for n in lengths]
    ours = paged_logits(path, sequences, chunk, prompt, kernels)
    with torch.inference_mode():
        theirs = [yardstick(s[None]).logits[0] for s in sequences]
    assert all(float(t.std()) > 0.5 for t in theirs), "logits are too flat to tell anything"
    for a, b in zip(ours, theirs, strict=True):
        assert torch.equal(a.argmax(-1), b.argmax(-1)), "greedy tokens differ"
    return max(float((a - b).abs().max()) for a, b in zip(ours, theirs, strict=True))


@pytest.fixture(scope="module", params=["reference", "cpu"])
def kernels(request):
    return ReferenceKernels() if request.param == "reference" else select_kernels(CPU, threads=2)


@pytest.mark.parametrize("form", ["transformers 5", "transformers 4"])
@pytest.mark.parametrize("name", CONFIGS)
def test_random_models_match_transformers(name, form, kernels, tmp_path):
    family, changes = CONFIGS[name]
    save_random(config(family, **changes), tmp_path)
    if form == "transformers 4":
        to_transformers_4_form(tmp_path)
    assert largest_difference(tmp_path, kernels) <= TOLERANCE


@pytest.mark.parametrize("family", FAMILIES)
def test_sharded_checkpoints_match_transformers(family, kernels, tmp_path):
    save_random(config(family), tmp_path, shard_size="30KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    assert largest_difference(tmp_path, kernels) <= TOLERANCE


@pytest.mark.parametrize("family", ["gpt_oss", "llama4_text", "granitemoe", "deepseek_v3"])
def test_bf16_weights_match_transformers_in_fp32(family, kernels, tmp_path):
    save_random(config(family), tmp_path, dtype=torch.bfloat16)
    assert largest_difference(tmp_path, kernels) <= TOLERANCE


def test_longrope_beyond_the_trained_length_takes_the_long_factor(kernels, tmp_path):
    """transformers switches the size of cosine and sine by length, but (since 5.0) not the frequencies: kept equal."""
    rope = LONG | HALVES | {"long_factor": HALVES["short_factor"], "original_max_position_embeddings": 16}
    save_random(config("phimoe", rope_parameters=rope), tmp_path)
    assert largest_difference(tmp_path, kernels, lengths=(37, 17, 64)) <= TOLERANCE


@pytest.mark.parametrize("preset", ["tiny-qwen3", "tiny-mixtral"])
def test_presets_match_transformers(preset, kernels, tmp_path):
    make_checkpoint(preset, tmp_path)
    assert largest_difference(tmp_path, kernels) <= TOLERANCE


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_weights_match_transformers_in_fp32(dtype, kernels, tmp_path):
    make_checkpoint("tiny-qwen3", tmp_path, dtype=dtype)
    assert largest_difference(tmp_path, kernels) <= TOLERANCE


@pytest.mark.parametrize("chunk, prompt", [(64, 64), (7, 40), (1, 0)])
def test_demo_model_matches_transformers(chunk, prompt, kernels):
    assert largest_difference(DEMO, kernels, chunk, prompt) <= TOLERANCE


@pytest.mark.parametrize("name", [*FAMILIES, "qwen3 tied, biased, dense layer", "mixtral sliding window, top-1"])
def test_bits_do_not_depend_on_batch_or_chunks(name, tmp_path):
    family, changes = CONFIGS[name]
    save_random(config(family, **changes), tmp_path)
    kernels = select_kernels(CPU, threads=2)
    sequences = [torch.randint(97, (n,), generator=torch.Generator().manual_seed(n)) for n in LENGTHS]
    together = paged_logits(tmp_path, sequences, chunk=64, prompt=64, kernels=kernels)
    stepwise = paged_logits(tmp_path, sequences, chunk=5, prompt=20, kernels=kernels)
    alone = [paged_logits(tmp_path, [s], chunk=7, prompt=64, kernels=kernels)[0] for s in sequences]
    for a, b, c in zip(together, stepwise, alone, strict=True):
        assert torch.equal(a, b) and torch.equal(a, c)
