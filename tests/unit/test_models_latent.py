"""Multi-head latent attention keeps what the paper promises: a cache of latents, whatever the number of heads."""

from pathlib import Path

import pytest
import torch

from shared.kernels.reference import ReferenceKernels
from shared.models.decoder import Decoder
from shared.models.loader import open_checkpoint
from tests.parity.families import config, save_random

CPU = torch.device("cpu")


@pytest.mark.parametrize("family", ["deepseek_v2", "deepseek_v3"])
def test_the_cache_holds_one_latent_and_one_rotated_key_per_token_and_layer(family: str, tmp_path: Path) -> None:
    made = config(family)
    save_random(made, tmp_path)
    decoder = Decoder(open_checkpoint(str(tmp_path)), ReferenceKernels(), CPU, torch.float32, 64)
    per_token = made.num_hidden_layers * (made.kv_lora_rank + made.qk_rope_head_dim) * 4
    assert decoder.bytes_per_block(16) == 16 * per_token
    cache = decoder.new_cache(blocks=3, block_size=16)
    stored = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in cache.k + cache.v}
    assert sum(stored.values()) == 3 * 16 * per_token


def test_grouped_attention_counts_keys_and_values(tmp_path: Path) -> None:
    made = config("qwen3_moe")
    save_random(made, tmp_path)
    decoder = Decoder(open_checkpoint(str(tmp_path)), ReferenceKernels(), CPU, torch.float32, 64)
    per_token = made.num_hidden_layers * 2 * made.num_key_value_heads * made.head_dim * 4
    assert decoder.bytes_per_block(16) == 16 * per_token
