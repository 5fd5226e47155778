"""Random checkpoints: reproducible, complete, and with a tokenizer that any id can be decoded by."""

import json

import pytest
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer

from shared.errors import ConfigError, ModelError
from shared.models.families import parse_config
from shared.models.layout import expected_tensors
from shared.models.presets import PRESETS, byte_tokenizer, make_checkpoint
from shared.models.source import open_source


@pytest.mark.parametrize("preset", ["tiny-qwen3", "tiny-mixtral"])
def test_a_tiny_preset_can_be_opened_and_is_small(tmp_path, preset):
    make_checkpoint(preset, tmp_path / "m")
    source = open_source(str(tmp_path / "m"))
    assert source.chat_template and source.spec.eos_ids == (0,)
    assert (tmp_path / "m" / "model.safetensors").stat().st_size < 2_000_000
    assert (tmp_path / "m" / "model.safetensors").stat().st_mode & 0o444 == 0o444


def test_the_seed_decides_the_bytes(tmp_path):
    files = []
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        make_checkpoint("tiny-qwen3", tmp_path / name, seed=seed)
        files.append((tmp_path / name / "model.safetensors").read_bytes())
    assert files[0] == files[1] != files[2]


def test_tensors_begin_at_cache_lines(tmp_path):
    make_checkpoint("tiny-qwen3", tmp_path / "m")
    file = (tmp_path / "m" / "model.safetensors").read_bytes()
    length = int.from_bytes(file[:8], "little")
    tensors = {k: v for k, v in json.loads(file[8 : 8 + length]).items() if k != "__metadata__"}
    assert tensors and all((8 + length + tensor["data_offsets"][0]) % 64 == 0 for tensor in tensors.values())


def test_a_dtype_that_is_not_stored_is_refused_before_anything_is_written(tmp_path):
    with pytest.raises(ModelError, match="float64"):
        make_checkpoint("tiny-qwen3", tmp_path / "m", dtype="float64")
    assert not (tmp_path / "m").exists()


def test_overrides_change_the_shapes(tmp_path):
    make_checkpoint("tiny-qwen3", tmp_path / "m", num_local_experts=5, num_experts_per_tok=1, mlp_only_layers=[1])
    assert open_source(str(tmp_path / "m")).facts().moe_layers == (0, 2)
    assert json.loads((tmp_path / "m" / "config.json").read_text())["num_local_experts"] == 5


def test_bench_1b_has_the_advertised_size():
    shapes = {t.name: t.shape for t in expected_tensors(parse_config(PRESETS["bench-1b"], {}, "bench-1b"))}
    assert sum(torch.Size(shape).numel() for shape in shapes.values()) == 864_586_752


def test_matrices_keep_the_variance_of_their_input(tmp_path):
    make_checkpoint("tiny-mixtral", tmp_path / "m")
    tensors = load_file(tmp_path / "m" / "model.safetensors")
    assert float(tensors["lm_head.weight"].std()) == pytest.approx(64**-0.5, rel=0.05)
    assert float(tensors["model.norm.weight"].mean()) == pytest.approx(1, abs=0.1)


@pytest.mark.parametrize("vocab_size", [257, 320, 8192])
def test_tokenizer_round_trip_and_every_id_has_text(tmp_path, vocab_size):
    byte_tokenizer(vocab_size).save(str(tmp_path / "tokenizer.json"))
    tokenizer = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    text = "In the beginning\n\tdef f(x): return 'naïve' + \"🙂\"\x00"
    ids = tokenizer.encode(text).ids
    assert len(ids) == len(text.encode()) and tokenizer.decode(ids) == text
    assert tokenizer.get_vocab_size() == vocab_size
    assert all(tokenizer.decode([i]) for i in range(1, vocab_size))
    assert tokenizer.encode("a<|endoftext|>b").ids[1] == 0


def test_refusals(tmp_path):
    with pytest.raises(ConfigError, match=r"--preset: 'nope' is unknown; there are: bench-1b"):
        make_checkpoint("nope", tmp_path / "m")
    with pytest.raises(ModelError, match=r"num_experts_per_tok is 9"):
        make_checkpoint("tiny-qwen3", tmp_path / "m", num_experts_per_tok=9)
    with pytest.raises(ModelError, match=r"vocab_size: 100 is not between"):
        make_checkpoint("tiny-qwen3", tmp_path / "m", vocab_size=100)
    assert not (tmp_path / "m").exists()
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("keep")
    with pytest.raises(ModelError, match="is not empty"):
        make_checkpoint("tiny-qwen3", tmp_path / "full")
    with pytest.raises(ModelError, match="is a file"):
        make_checkpoint("tiny-qwen3", tmp_path / "full" / "mine.txt")
    assert (tmp_path / "full" / "mine.txt").read_text() == "keep"
