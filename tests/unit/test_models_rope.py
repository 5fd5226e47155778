"""Tables of scaled rotary embeddings against transformers' own functions."""

from typing import Any

import pytest
import torch
from transformers import PhimoeConfig, Qwen3MoeConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from shared.models.families import parse_config
from shared.models.rope import rope_tables

CPU = torch.device("cpu")
SHAPE: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 64,
    "max_position_embeddings": 512,
    "num_attention_heads": 2,
    "num_hidden_layers": 1,
    "vocab_size": 99,
}
ORIGINAL = {"rope_theta": 1000.0, "original_max_position_embeddings": 64}
KINDS: dict[str, dict[str, Any]] = {
    "linear": {"rope_type": "linear", "rope_theta": 1000.0, "factor": 3.0},
    "llama3": ORIGINAL | {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0},
    "yarn": ORIGINAL | {"rope_type": "yarn", "factor": 8.0},
    "yarn not truncated": ORIGINAL | {"rope_type": "yarn", "factor": 8.0, "truncate": False, "beta_fast": 16.0},
    "yarn with strengths": ORIGINAL | {"rope_type": "yarn", "factor": 8.0, "mscale": 0.7, "mscale_all_dim": 1.2},
    "yarn with a given factor": ORIGINAL | {"rope_type": "yarn", "factor": 8.0, "attention_factor": 1.4},
}
LONG = {"rope_type": "longrope", "rope_theta": 1000.0, "short_mscale": 1.1, "long_mscale": 1.3}
LONG |= {"short_factor": [1.0 + i / 8 for i in range(16)], "long_factor": [1.0 + i for i in range(16)]}


def assert_tables(rope: dict[str, Any], inverse: torch.Tensor, size: float, kind: str, positions: int) -> None:
    values = SHAPE | {"model_type": kind, "rope_parameters": rope, "num_local_experts": 4, "num_experts_per_tok": 2}
    values |= {"head_dim": 32, "moe_intermediate_size": 8}
    spec = parse_config(values, {}, kind).layers[0].attention.rope
    assert spec is not None
    cos, sin = rope_tables(spec, positions, CPU)
    angle = torch.arange(positions).double()[:, None] * inverse.double()
    torch.testing.assert_close(cos, (angle.cos() * size).float(), rtol=0, atol=2e-5)
    torch.testing.assert_close(sin, (angle.sin() * size).float(), rtol=0, atol=2e-5)


@pytest.mark.parametrize("name", KINDS)
def test_scaled_tables_are_those_of_transformers(name: str) -> None:
    config = Qwen3MoeConfig(**SHAPE | {"head_dim": 32, "rope_parameters": dict(KINDS[name])})
    inverse, size = ROPE_INIT_FUNCTIONS[KINDS[name]["rope_type"]](config, CPU)
    assert_tables(KINDS[name], inverse, size, "qwen3_moe", 200)


@pytest.mark.parametrize("positions, size", [(64, 1.1), (65, 1.3)])
def test_longrope_takes_its_form_from_the_longest_sequence_that_is_served(positions: int, size: float) -> None:
    rope = LONG | {"original_max_position_embeddings": 64}
    config = PhimoeConfig(**SHAPE, rope_parameters=dict(rope))
    inverse, _ = ROPE_INIT_FUNCTIONS["longrope"](config, CPU, seq_len=positions)
    assert_tables(rope, inverse, size, "phimoe", positions)
