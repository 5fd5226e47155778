"""Checkpoints with seeded random weights, for benches and tests: the usual files, in transformers' own form.

Everything follows from a config: families.py and layout.py say which tensors it asks for.
"""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor

from shared.errors import ConfigError, ModelError
from shared.models.families import parse_config
from shared.models.layout import Shape, expected_tensors

SHARD_BYTES = 500 * 10**6
CACHE_LINE = 64
END = "<|endoftext|>"
_STORED_DTYPES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}
CHAT_TEMPLATE = (
    "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)

_COMMON: dict[str, Any] = {
    "bos_token_id": None,
    "eos_token_id": 0,
    "hidden_act": "silu",
    "max_position_embeddings": 4096,
    "pad_token_id": 0,
    "rms_norm_eps": 1e-6,
    "rope_parameters": {"rope_theta": 10000.0, "rope_type": "default"},
    "tie_word_embeddings": False,
}
_QWEN3 = _COMMON | {
    "architectures": ["Qwen3MoeForCausalLM"],
    "attention_bias": False,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
    "model_type": "qwen3_moe",
    "norm_topk_prob": True,
    "sliding_window": None,
    "use_sliding_window": False,
}
PRESETS: Mapping[str, Mapping[str, Any]] = {
    "bench-1b": _QWEN3
    | {
        "dtype": "bfloat16",
        "head_dim": 64,
        "hidden_size": 1024,
        "intermediate_size": 2048,
        "moe_intermediate_size": 512,
        "num_attention_heads": 16,
        "num_experts_per_tok": 4,
        "num_hidden_layers": 16,
        "num_key_value_heads": 4,
        "num_local_experts": 32,
        "vocab_size": 8192,
    },
    "tiny-qwen3": _QWEN3
    | {
        "dtype": "float32",
        "head_dim": 16,
        "hidden_size": 48,
        "intermediate_size": 80,
        "moe_intermediate_size": 32,
        "num_attention_heads": 4,
        "num_experts_per_tok": 3,
        "num_hidden_layers": 3,
        "num_key_value_heads": 2,
        "num_local_experts": 7,
        "vocab_size": 320,
    },
    "tiny-mixtral": _COMMON
    | {
        "architectures": ["MixtralForCausalLM"],
        "dtype": "float32",
        "head_dim": None,
        "hidden_size": 64,
        "intermediate_size": 48,
        "model_type": "mixtral",
        "num_attention_heads": 4,
        "num_experts_per_tok": 2,
        "num_hidden_layers": 3,
        "num_key_value_heads": 2,
        "num_local_experts": 8,
        "sliding_window": None,
        "vocab_size": 320,
    },
}


def make_checkpoint(preset: str, out: Path, seed: int = 0, **overrides: Any) -> None:
    """Write the preset's checkpoint to the directory ``out`` (made if need be, else it has to be empty).

    ``overrides`` replace keys of config.json. The same arguments write the same bytes. Holds one tensor in memory.
    Raises ConfigError for an unknown preset, ModelError for overrides or a directory that will not do.
    """
    if preset not in PRESETS:
        raise ConfigError("--preset", f"{preset!r} is unknown; there are: {', '.join(PRESETS)}")
    config = {**PRESETS[preset], **overrides}
    shapes = {t.name: t.shape for t in expected_tensors(parse_config(config, {}, f"preset {preset}"))}
    if config["dtype"] not in _STORED_DTYPES:
        raise ModelError("dtype", f"{config['dtype']!r} is not one of {', '.join(_STORED_DTYPES)}")
    tokenizer = byte_tokenizer(config["vocab_size"])
    try:
        out.mkdir(parents=True, exist_ok=True)
    except FileExistsError as error:
        raise ModelError(str(out), "is a file") from error
    if any(out.iterdir()):
        raise ModelError(str(out), "is not empty")
    _write_weights(out, shapes, getattr(torch, config["dtype"]), seed)
    _write_texts(out, config, tokenizer)


def byte_tokenizer(vocab_size: int) -> Tokenizer:
    """Every UTF-8 byte is one token; ids 1..256. Id 0 ends a text.

    The rest of the vocabulary is pairs of printable ASCII characters that no text is ever encoded to: so a random
    model's output has text, whatever ids it chooses.
    """
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    pairs = (chr(33 + i // 94) + chr(33 + i % 94) for i in range(94 * 94))
    tokens = [END, *alphabet, *pairs]
    if not 1 + len(alphabet) <= vocab_size <= len(tokens):
        raise ModelError("vocab_size", f"{vocab_size} is not between {1 + len(alphabet)} and {len(tokens)}")
    tokenizer = Tokenizer(models.BPE(vocab={t: i for i, t in enumerate(tokens[:vocab_size])}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)  # pyright: ignore
    tokenizer.decoder = decoders.ByteLevel()  # pyright: ignore
    tokenizer.add_special_tokens([END])
    return tokenizer


def _write_weights(out: Path, shapes: Mapping[str, Shape], dtype: torch.dtype, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    shards = list(_shards(shapes, dtype.itemsize))
    weight_map: dict[str, str] = {}
    for number, names in enumerate(shards, start=1):
        file = f"model-{number:05}-of-{len(shards):05}.safetensors" if len(shards) > 1 else "model.safetensors"
        with (out / file).open("wb") as shard:
            shard.write(_header({name: shapes[name] for name in names}, dtype))
            for name in names:
                tensor = _random_tensor(shapes[name], dtype, generator)
                tensor.flatten().view(torch.uint8).numpy().tofile(shard)
        weight_map |= dict.fromkeys(names, file)
    if len(shards) > 1:
        total = sum(torch.Size(shape).numel() for shape in shapes.values()) * dtype.itemsize
        _write_json(out / "model.safetensors.index.json", {"metadata": {"total_size": total}, "weight_map": weight_map})


def _header(shapes: Mapping[str, Shape], dtype: torch.dtype) -> bytes:
    """Of a safetensors file; padded, as the format allows, until the tensors begin at a line of the CPU's caches.

    Files of the ``safetensors`` package begin anywhere, and kernels that read them where they lie touch every line
    twice.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end, stored = 0, _STORED_DTYPES[str(dtype).removeprefix("torch.")]
    for name, shape in shapes.items():
        start, end = end, end + torch.Size(shape).numel() * dtype.itemsize
        header[name] = {"dtype": stored, "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % CACHE_LINE)
    return len(text).to_bytes(8, "little") + text


def _shards(shapes: Mapping[str, Shape], item_bytes: int) -> Iterator[list[str]]:
    """Names in order, cut so that a shard stays below SHARD_BYTES where its tensors allow it."""
    names: list[str] = []
    filled = 0
    for name, shape in shapes.items():
        size = torch.Size(shape).numel() * item_bytes
        if names and filled + size > SHARD_BYTES:
            yield names
            names, filled = [], 0
        names.append(name)
        filled += size
    yield names


def _random_tensor(shape: Shape, dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    """Matrices keep the variance of their input; vectors (norms) scatter around one."""
    noise = torch.randn(shape, generator=generator)
    return (noise.mul_(0.1).add_(1.0) if len(shape) == 1 else noise.mul_(shape[-1] ** -0.5)).to(dtype)


def _write_texts(out: Path, config: Mapping[str, Any], tokenizer: Tokenizer) -> None:
    tokenizer.save(str(out / "tokenizer.json"))
    _write_json(out / "config.json", config)
    _write_json(out / "generation_config.json", {"eos_token_id": config["eos_token_id"], "pad_token_id": 0})
    settings = {"eos_token": END, "pad_token": END, "tokenizer_class": "PreTrainedTokenizerFast"}
    settings["model_max_length"] = config["max_position_embeddings"]
    _write_json(out / "tokenizer_config.json", settings)
    (out / "chat_template.jinja").write_text(CHAT_TEMPLATE, "utf-8")


def _write_json(path: Path, value: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", "utf-8")
