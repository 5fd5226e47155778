"""Forms in which hubs store weights that save_pretrained does not write: packed, or as a part of a larger model."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from safetensors.torch import load_file, save_file
from transformers.utils.quantization_config import Mxfp4Config

from shared.errors import ModelError
from shared.kernels.base import select_kernels
from shared.kernels.reference import ReferenceKernels
from shared.kernels.weights import Fp8Blocks
from shared.models.layout import expert_roles
from shared.models.loader import open_checkpoint
from shared.models.moe import MoeLayer, expert_weights
from shared.models.slots import DeviceSlots, HostSlots, tensors_of
from tests.parity.families import config, load_yardstick, randomise, save_random
from tests.parity.test_local_models import CPU, TOLERANCE, largest_difference

BLOCK = (16, 24)
"""Of FP8 scales; divides none of the tiny shapes evenly."""
WEIGHTS = "model.safetensors"


@pytest.fixture(scope="module", params=["reference", "cpu"])
def kernels(request: pytest.FixtureRequest) -> Any:
    return ReferenceKernels() if request.param == "reference" else select_kernels(CPU, threads=2)


def edit_config(path: Path, **changes: Any) -> None:
    file = path / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def pack_fp8(tensors: dict[str, torch.Tensor]) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """(projections as DeepSeek-V3 stores them, the same unpacked); norms, gate, embedding and head stay."""
    packed, unpacked = dict(tensors), dict(tensors)
    for name, weight in tensors.items():
        if not name.endswith("_proj.weight") and not name.endswith("_mqa.weight"):
            continue
        shape = [-(-size // block) for size, block in zip(weight.shape, BLOCK, strict=True)]
        scales = torch.rand(shape, generator=torch.Generator().manual_seed(len(name))) * 0.02 + 0.001
        wide = scales.repeat_interleave(BLOCK[0], 0)[: len(weight)].repeat_interleave(BLOCK[1], 1)[:, : weight.shape[1]]
        packed[name] = (weight / wide).clamp(-448, 448).to(torch.float8_e4m3fn)
        packed[f"{name}_scale_inv"] = scales
        unpacked[name] = packed[name].float() * wide
    return packed, unpacked


def make_fp8(path: Path) -> tuple[Path, Path]:
    """A DeepSeek-V3 in FP8, and the same checkpoint unpacked."""
    save_random(config("deepseek_v3"), path / "packed")
    save_random(config("deepseek_v3"), path / "unpacked")
    packed, unpacked = pack_fp8(load_file(path / "packed" / WEIGHTS))
    save_file(packed, path / "packed" / WEIGHTS, metadata={"format": "pt"})
    save_file(unpacked, path / "unpacked" / WEIGHTS, metadata={"format": "pt"})
    quantised = {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": list(BLOCK)}
    edit_config(path / "packed", quantization_config=quantised)
    return path / "packed", path / "unpacked"


def test_fp8_blocks_match_transformers_on_the_unpacked_weights(kernels: Any, tmp_path: Path) -> None:
    packed, unpacked = make_fp8(tmp_path)
    assert largest_difference(packed, kernels, yardstick=load_yardstick(unpacked)) <= TOLERANCE


def test_fp8_experts_and_projections_stay_in_the_mapped_file(kernels: Any, tmp_path: Path) -> None:
    checkpoint = open_checkpoint(str(make_fp8(tmp_path)[0]))
    spec, layer = checkpoint.spec, checkpoint.spec.moe_layers[0]
    moe = MoeLayer(checkpoint, kernels, CPU, torch.float32, layer)
    moe.load(range(spec.router.experts))
    stored = f"model.layers.{layer}.mlp.experts."
    assert moe.nbytes == sum(
        i.end - i.start for name, i in checkpoint.source.tensors.items() if name.startswith(stored)
    )
    spans = mapped(checkpoint.path / WEIGHTS)
    for role in (*expert_roles(spec), "q_a", "o", "shared_gate"):
        weight = checkpoint.weight(role, layer, 3, CPU, torch.float32)
        assert isinstance(weight, Fp8Blocks) and weight.values.dtype is torch.float8_e4m3fn
        assert weight.factors.dtype is torch.float32
        assert any(start <= weight.values.data_ptr() < end for start, end in spans)


@pytest.mark.parametrize("family", ["fp8", "gpt_oss", "llama4_text"])
def test_slots_take_what_is_stored_packed_or_side_by_side(family: str, tmp_path: Path) -> None:
    if family == "fp8":
        path = make_fp8(tmp_path)[0]
    else:
        path = tmp_path / family
        save_random(config(family), path)
    checkpoint = open_checkpoint(str(path))
    for expert in (0, checkpoint.spec.router.experts - 1):
        weights = expert_weights(checkpoint, checkpoint.spec.moe_layers[-1], expert, CPU, torch.float32)
        for slots in (HostSlots(1, weights), DeviceSlots(1, CPU, torch.float32)):
            held = slots.fill(0, weights, checkpoint.read)
            for ours, theirs in zip(tensors_of(held), tensors_of(weights), strict=True):
                assert torch.equal(ours.view(torch.uint8), theirs.view(torch.uint8))
                assert ours.data_ptr() != theirs.data_ptr() or not checkpoint.is_view(theirs)


def mapped(file: Path) -> list[tuple[int, int]]:
    """Addresses at which a file is mapped."""
    lines = [line.split() for line in Path("/proc/self/maps").read_text().splitlines() if line.endswith(str(file))]
    return [(int(start, 16), int(end, 16)) for start, end in (line[0].split("-") for line in lines)]


def test_fp8_without_its_scales_is_refused(tmp_path: Path) -> None:
    packed, _ = make_fp8(tmp_path)
    tensors = load_file(packed / WEIGHTS)
    name = "model.layers.1.mlp.experts.3.up_proj.weight_scale_inv"
    del tensors[name]
    save_file(tensors, packed / WEIGHTS, metadata={"format": "pt"})
    with pytest.raises(ModelError, match=f"{name} is missing"):
        open_checkpoint(str(packed))


def test_mxfp4_experts_match_transformers(kernels: Any, tmp_path: Path) -> None:
    """transformers unpacks them itself; scales of 2**-4 .. 2**-1 keep activations sane."""
    save_random(config("gpt_oss"), tmp_path, dtype=torch.bfloat16)
    tensors = load_file(tmp_path / WEIGHTS)
    generator = torch.Generator().manual_seed(3)
    for name in [name for name in tensors if name.endswith(("experts.gate_up_proj", "experts.down_proj"))]:
        experts, inputs, outputs = tensors.pop(name).shape
        groups = (experts, outputs, inputs // 32)
        tensors[f"{name}_blocks"] = torch.randint(0, 256, (*groups, 16), dtype=torch.uint8, generator=generator)
        tensors[f"{name}_scales"] = torch.randint(123, 127, groups, dtype=torch.uint8, generator=generator)
    save_file(tensors, tmp_path / WEIGHTS, metadata={"format": "pt"})
    edit_config(tmp_path, quantization_config={"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]})
    packing = Mxfp4Config(dequantize=True)
    model = tf.GptOssForCausalLM.from_pretrained(
        tmp_path, dtype=torch.float32, attn_implementation="eager", quantization_config=packing
    )
    assert largest_difference(tmp_path, kernels, yardstick=model.float().eval()) <= TOLERANCE


def test_clamped_activations_match_transformers(kernels: Any, tmp_path: Path) -> None:
    """Weights so large that gates and ups of gpt-oss reach their limits of 7."""
    save_random(config("gpt_oss"), tmp_path)
    tensors = load_file(tmp_path / WEIGHTS)
    for name in [name for name in tensors if name.endswith("experts.gate_up_proj")]:
        tensors[name] *= 8
    save_file(tensors, tmp_path / WEIGHTS, metadata={"format": "pt"})
    assert largest_difference(tmp_path, kernels) <= TOLERANCE


def test_llama_4_as_the_hub_has_it_matches_transformers(kernels: Any, tmp_path: Path) -> None:
    """The text model inside a model with vision: ``text_config``, and names that start with language_model."""
    vision = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    vision |= {"vision_output_dim": 16, "image_size": 28, "patch_size": 14}
    vision |= {"projector_input_dim": 16, "projector_output_dim": 16}
    whole = tf.Llama4Config(text_config=config("llama4_text").to_dict(), vision_config=vision)
    torch.manual_seed(0)
    model = tf.Llama4ForConditionalGeneration(whole).eval()
    randomise(model)
    save_random(config("llama4_text"), tmp_path)  # the tokenizer; its weights are replaced
    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["model_type"] == "llama4"
    assert largest_difference(tmp_path, kernels, yardstick=model.language_model) <= TOLERANCE
