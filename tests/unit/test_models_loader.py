"""Opening checkpoints: what is found, what is shared, and the words of every refusal."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from shared.errors import ModelError, UnsupportedModel
from shared.models import presets
from shared.models.loader import open_checkpoint
from shared.models.presets import make_checkpoint
from shared.models.source import DEMO, open_source


@pytest.fixture
def tiny(tmp_path):
    path = tmp_path / "tiny"
    make_checkpoint("tiny-qwen3", path)
    return path


def edit_json(path: Path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def edit_weights(directory: Path, change):
    tensors = load_file(directory / "model.safetensors")
    change(tensors)
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})


def refusal(model) -> str:
    with pytest.raises(ModelError) as caught:
        open_checkpoint(str(model))
    return str(caught.value)


def test_the_demo_model_is_what_an_empty_name_means():
    source = open_source("")
    assert (source.path, source.name, source.spec.eos_ids) == (DEMO, "demo", (0,))
    assert source.facts().experts == 32 and source.facts().moe_layers == tuple(range(6))
    assert source.chat_template and source.tokenizer_file == DEMO / "tokenizer.json"
    assert source.generation_config["eos_token_id"] == 0


def test_metadata_needs_no_torch():
    code = "import sys; from shared.models.source import open_source; open_source(''); print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.strip() == "False"


def test_tensors_are_those_of_the_file(tiny):
    checkpoint = open_checkpoint(str(tiny))
    for name, tensor in load_file(tiny / "model.safetensors").items():
        assert torch.equal(checkpoint.tensor(name), tensor)


def test_a_view_is_read_from_where_it_lies_in_its_file(tiny):
    checkpoint = open_checkpoint(str(tiny))
    for name, tensor in load_file(tiny / "model.safetensors").items():
        for view, expected in ((checkpoint.tensor(name), tensor), (checkpoint.tensor(name)[1:], tensor[1:])):
            room = torch.zeros_like(expected)
            assert checkpoint.is_view(view)
            assert checkpoint.read(view, room.data_ptr())
            assert torch.equal(room, expected)


def test_pages_that_are_let_go_of_are_read_again(tiny):
    checkpoint, file = open_checkpoint(str(tiny)), tiny / "model.safetensors"
    before = mapped(file)
    views = [checkpoint.tensor(name) for name in checkpoint.source.tensors]
    copies = [view.clone() for view in views]
    assert mapped(file) > before
    checkpoint.let_go()
    assert mapped(file) == before
    assert all(torch.equal(view, copy) for view, copy in zip(views, copies, strict=True))


def mapped(file: Path) -> int:
    """KiB of a file that this process has mapped."""
    lines = Path("/proc/self/smaps").read_text().splitlines()
    starts = [number for number, line in enumerate(lines) if line.endswith(str(file))]
    return sum(int(next(line for line in lines[n:] if line.startswith("Rss:")).split()[1]) for n in starts)


def test_what_is_no_view_of_a_file_is_not_read_from_one(tiny):
    checkpoint = open_checkpoint(str(tiny))
    room = torch.zeros(8)
    copy = checkpoint.tensor("model.norm.weight")[:8].clone()
    assert not checkpoint.is_view(copy)
    assert not checkpoint.read(copy, room.data_ptr())
    assert not room.any()


def test_a_file_that_ends_within_a_view_is_named(tiny):
    checkpoint = open_checkpoint(str(tiny))
    last = max(checkpoint.source.tensors, key=lambda name: checkpoint.source.tensors[name].end)
    view, file = checkpoint.tensor(last), tiny / "model.safetensors"
    room = torch.empty_like(view)
    os.truncate(file, file.stat().st_size - 1)
    with pytest.raises(ModelError, match="ends before its last tensor") as caught:
        checkpoint.read(view, room.data_ptr())
    assert str(file) in str(caught.value)


def test_tensors_are_views_of_the_mapped_file():
    checkpoint = open_checkpoint("")
    address = checkpoint.tensor("model.embed_tokens.weight").data_ptr()
    with Path("/proc/self/maps").open() as maps:
        spans = [line.split()[0].split("-") for line in maps if str(DEMO / "model.safetensors") in line]
    assert any(int(start, 16) <= address < int(end, 16) for start, end in spans)


def test_writing_to_a_view_leaves_the_file_alone(tiny):
    before = (tiny / "model.safetensors").read_bytes()
    open_checkpoint(str(tiny)).tensor("model.norm.weight").fill_(7)
    assert (tiny / "model.safetensors").read_bytes() == before


def test_shards_are_one_checkpoint(tmp_path, monkeypatch):
    make_checkpoint("tiny-mixtral", tmp_path / "one", seed=3)
    monkeypatch.setattr(presets, "SHARD_BYTES", 200_000)
    make_checkpoint("tiny-mixtral", tmp_path / "many", seed=3)
    one, many = open_checkpoint(str(tmp_path / "one")), open_checkpoint(str(tmp_path / "many"))
    assert len({info.file for info in many.source.tensors.values()}) > 2
    assert all(torch.equal(one.tensor(name), many.tensor(name)) for name in one.source.tensors)
    assert one.digest != many.digest


def test_digest_follows_config_index_and_tokenizer(tiny, tmp_path):
    digests = {open_source(str(tiny)).digest}
    copy = shutil.copytree(tiny, tmp_path / "other-name")
    assert open_source(str(copy)).digest in digests
    edit_json(copy / "config.json", rms_norm_eps=1e-5)
    digests.add(open_source(str(copy)).digest)
    (copy / "tokenizer.json").write_text((copy / "tokenizer.json").read_text() + "\n")
    digests.add(open_source(str(copy)).digest)
    edit_weights(copy, lambda t: t.update({"model.norm.weight": t["model.norm.weight"].half()}))
    digests.add(open_source(str(copy)).digest)
    assert len(digests) == 4


@pytest.mark.parametrize(
    "entry, expected",
    [
        ("text", "text"),
        ([{"name": "tool_use", "template": "a"}, {"name": "default", "template": "b"}], "b"),
        ([{"name": "tool_use", "template": "a"}], None),
        (None, None),
    ],
)
def test_chat_template_from_the_tokenizer_config(tiny, entry, expected):
    assert open_source(str(tiny)).chat_template == presets.CHAT_TEMPLATE
    (tiny / "chat_template.jinja").unlink()
    edit_json(tiny / "tokenizer_config.json", chat_template=entry)
    assert open_source(str(tiny)).chat_template == expected


def test_optional_files_may_be_absent(tiny):
    for name in ("generation_config.json", "tokenizer_config.json", "chat_template.jinja"):
        (tiny / name).unlink()
    source = open_source(str(tiny))
    assert (source.generation_config, source.chat_template, source.spec.eos_ids) == ({}, None, (0,))


# ---- refusals ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model", ["/no/such/place", "./nothing-here", "a/b/c", "~/no-such-model-directory"])
def test_unknown_directory(model):
    assert "no such directory" in refusal(model)


def test_a_file_is_not_a_directory(tiny):
    assert "config.json: is not a directory" in refusal(tiny / "config.json")


def test_no_config(tiny):
    (tiny / "config.json").unlink()
    assert "config.json: is missing" in refusal(tiny)


@pytest.mark.parametrize("text", ["{", "\ufffe\x00", "[" * 100_000, ""])
@pytest.mark.parametrize("name", ["config.json", "generation_config.json", "tokenizer_config.json"])
def test_broken_json(tiny, name, text):
    (tiny / name).write_text(text)
    assert f"{name}: is not valid JSON" in refusal(tiny)


def test_invalid_utf8_and_json_that_is_no_object(tiny):
    (tiny / "config.json").write_bytes(b'{"a": "\xff"}')
    assert "config.json: is not valid JSON" in refusal(tiny)
    (tiny / "config.json").write_text("[]")
    assert "config.json: holds no JSON object" in refusal(tiny)


def test_other_architectures_get_the_list_of_supported_ones(tiny):
    edit_json(tiny / "config.json", model_type="llama")
    with pytest.raises(UnsupportedModel, match=r"'llama' is not supported; supported: deepseek_v2, .*mixtral"):
        open_checkpoint(str(tiny))


def test_no_weights_and_pytorch_weights(tiny):
    (tiny / "model.safetensors").unlink()
    assert "holds no safetensors weights" in refusal(tiny)
    (tiny / "pytorch_model.bin").write_bytes(b"x")
    assert ".bin and .pt files are not supported" in refusal(tiny)


def test_no_tokenizer(tiny):
    (tiny / "tokenizer.json").unlink()
    assert "tokenizer.json: is missing" in refusal(tiny)


@pytest.mark.parametrize("keep", [0, 7, 100, -1, -70_000])
def test_truncated_weights(tiny, keep):
    data = (tiny / "model.safetensors").read_bytes()
    (tiny / "model.safetensors").write_bytes(data[:keep])
    assert "model.safetensors: is truncated" in refusal(tiny)


@pytest.mark.parametrize("header", [b"\xff" * 64, b"[]", b"{", b'{"a": 1}', b'{"a": {"dtype": "F32", "shape": [1]}}'])
def test_damaged_header(tiny, header):
    (tiny / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header)
    assert "model.safetensors: is not a safetensors file" in refusal(tiny)


def test_offsets_that_do_not_fit(tiny):
    header = b'{"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}}'
    (tiny / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + bytes(4))
    assert "tensor a has offsets that do not fit its shape" in refusal(tiny)


def test_missing_tensor(tiny):
    edit_weights(tiny, lambda t: t.pop("model.layers.1.mlp.experts.6.up_proj.weight"))
    assert "tensor model.layers.1.mlp.experts.6.up_proj.weight is missing" in refusal(tiny)
    edit_weights(tiny, lambda t: t.pop("model.norm.weight"))
    assert "tensor model.norm.weight and 1 more is missing" in refusal(tiny)


def test_wrong_shape_and_dtype(tiny):
    edit_weights(tiny, lambda t: t.update({"lm_head.weight": torch.zeros(320, 47)}))
    assert "tensor lm_head.weight has shape [320, 47], config.json asks for [320, 48]" in refusal(tiny)
    edit_weights(tiny, lambda t: t.update({"lm_head.weight": torch.zeros(320, 48, dtype=torch.float8_e4m3fn)}))
    assert "tensor lm_head.weight has dtype F8_E4M3; supported: F32, BF16, F16" in refusal(tiny)


def test_broken_shards(tmp_path, monkeypatch):
    monkeypatch.setattr(presets, "SHARD_BYTES", 200_000)
    path = tmp_path / "m"
    make_checkpoint("tiny-qwen3", path)
    index = path / "model.safetensors.index.json"
    good = index.read_text()
    shard = path / json.loads(good)["weight_map"]["model.norm.weight"]

    edit_json(index, weight_map={"model.norm.weight": "../outside.safetensors"})
    assert "weight_map has to be" in refusal(path)
    edit_json(index, weight_map=json.loads(good)["weight_map"] | {"extra": shard.name})
    assert f"{shard.name}: tensor extra is missing" in refusal(path)
    index.write_text(good)
    shard.unlink()
    assert f"{shard.name}: is missing" in refusal(path)


# ---- the hub ----------------------------------------------------------------------------------------------


@pytest.fixture
def offline_hub(tmp_path, monkeypatch):
    """The hub's cache in a directory of its own, and no network."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    return tmp_path / "hub"


def test_a_cached_hub_model_opens_offline(offline_hub, tiny):
    revision = "0" * 40
    entry = offline_hub / "models--some--model"
    (entry / "refs").mkdir(parents=True)
    (entry / "refs" / "main").write_text(revision)
    (entry / "snapshots").mkdir()
    tiny.rename(entry / "snapshots" / revision)
    source = open_source("some/model")
    assert (source.name, source.path) == ("some/model", entry / "snapshots" / revision)


def test_an_unknown_hub_model_offline(offline_hub):
    assert "some/other: is not a directory, not (completely) in the hub's cache" in refusal("some/other")


def test_a_name_that_the_hub_cannot_have(offline_hub):
    assert "is neither a directory nor a hub id" in refusal("not a model!")
