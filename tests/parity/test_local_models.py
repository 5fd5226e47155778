"""One process, no mesh: Decoder and MoeLayer against transformers on one checkpoint, in chunks over a paged cache."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, MixtralConfig, Qwen3MoeConfig

from shared.kernels.base import select_kernels
from shared.kernels.reference import ReferenceKernels
from shared.models.decoder import KvCache, StepInput
from shared.models.loader import open_checkpoint
from shared.models.local import LocalModel
from shared.models.presets import make_checkpoint
from shared.models.source import DEMO

TOLERANCE = 1e-4
CPU = torch.device("cpu")
LENGTHS = (37, 5, 64)

_SHAPE: dict[str, Any] = {
    "vocab_size": 97,
    "hidden_size": 40,
    "intermediate_size": 56,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "num_experts_per_tok": 3,
    "num_local_experts": 7,
}


def qwen3(**changes: Any) -> Qwen3MoeConfig:
    own: dict[str, Any] = {"moe_intermediate_size": 24, "head_dim": 24, "norm_topk_prob": True}
    return Qwen3MoeConfig(**{**_SHAPE, **own, **changes})


def mixtral(**changes: Any) -> MixtralConfig:
    return MixtralConfig(**{**_SHAPE, **changes})


LINEAR = {"rope_type": "linear", "factor": 3.0, "rope_theta": 5000.0}
CONFIGS = {
    "qwen3": qwen3(),
    "qwen3 tied, biased, dense layer": qwen3(tie_word_embeddings=True, attention_bias=True, mlp_only_layers=[1]),
    "qwen3 top-k weights as they are": qwen3(norm_topk_prob=False),
    "qwen3 sparse step, linear rope": qwen3(decoder_sparse_step=2, rope_parameters=LINEAR),
    "qwen3 sliding window": qwen3(use_sliding_window=True, sliding_window=9),
    "mixtral": mixtral(),
    "mixtral head size, one kv head": mixtral(num_key_value_heads=1, head_dim=6),
    "mixtral tied, gelu": mixtral(tie_word_embeddings=True, hidden_act="gelu"),
    "mixtral tanh gelu": mixtral(hidden_act="gelu_pytorch_tanh"),
    "mixtral sliding window, top-1": mixtral(num_experts_per_tok=1, sliding_window=7),
}


def load_yardstick(path: Path):
    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, attn_implementation="eager").eval()


def save_random(config, path: Path, shard_size: str = "5GB") -> None:
    """Weights with sane activations and norms that are not one, written by transformers itself."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    for parameter in model.parameters():
        noise = torch.randn_like(parameter)
        parameter.data = 1 + 0.2 * noise if parameter.dim() == 1 else noise * parameter.shape[-1] ** -0.5
    model.save_pretrained(path, max_shard_size=shard_size)
    shutil.copy(DEMO / "tokenizer.json", path)


def to_transformers_4_form(path: Path) -> None:
    config = json.loads((path / "config.json").read_text())
    rope = config.pop("rope_parameters")
    config |= {"rope_theta": rope.pop("rope_theta"), "torch_dtype": config.pop("dtype")}
    kind = rope.pop("rope_type")
    config["rope_scaling"] = None if kind == "default" else {"type": kind, **rope}
    if config["model_type"] == "qwen3_moe":
        config["num_experts"] = config.pop("num_local_experts")
    (path / "config.json").write_text(json.dumps(config))


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


def largest_difference(path: Path, kernels, chunk: int = 8, prompt: int = 24) -> float:
    yardstick = load_yardstick(path)
    generator = torch.Generator().manual_seed(2)
    sequences = [torch.randint(yardstick.config.vocab_size, (n,), generator=generator) for n in LENGTHS]
    ours = paged_logits(path, sequences, chunk, prompt, kernels)
    with torch.inference_mode():
        theirs = [yardstick(s[None]).logits[0] for s in sequences]
    assert all(float(t.std()) > 0.5 for t in theirs), "logits are too flat to tell anything"
    return max(float((a - b).abs().max()) for a, b in zip(ours, theirs, strict=True))


@pytest.fixture(scope="module", params=["reference", "cpu"])
def kernels(request):
    return ReferenceKernels() if request.param == "reference" else select_kernels(CPU, threads=2)


@pytest.mark.parametrize("form", ["transformers 5", "transformers 4"])
@pytest.mark.parametrize("name", CONFIGS)
def test_random_models_match_transformers(name, form, kernels, tmp_path):
    save_random(CONFIGS[name], tmp_path)
    if form == "transformers 4":
        to_transformers_4_form(tmp_path)
    assert largest_difference(tmp_path, kernels) <= TOLERANCE


def test_sharded_checkpoint_matches_transformers(kernels, tmp_path):
    save_random(CONFIGS["qwen3"], tmp_path, shard_size="50KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    assert largest_difference(tmp_path, kernels) <= TOLERANCE


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


@pytest.mark.parametrize("name", ["qwen3 tied, biased, dense layer", "mixtral sliding window, top-1"])
def test_bits_do_not_depend_on_batch_or_chunks(name, tmp_path):
    save_random(CONFIGS[name], tmp_path)
    kernels = select_kernels(CPU, threads=2)
    sequences = [torch.randint(97, (n,), generator=torch.Generator().manual_seed(n)) for n in LENGTHS]
    together = paged_logits(tmp_path, sequences, chunk=64, prompt=64, kernels=kernels)
    stepwise = paged_logits(tmp_path, sequences, chunk=5, prompt=20, kernels=kernels)
    alone = [paged_logits(tmp_path, [s], chunk=7, prompt=64, kernels=kernels)[0] for s in sequences]
    for a, b, c in zip(together, stepwise, alone, strict=True):
        assert torch.equal(a, b) and torch.equal(a, c)
