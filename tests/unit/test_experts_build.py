"""Making an expert instance: what it costs before any placement is known."""

from pathlib import Path

import torch

from services.experts.build import warm_up
from shared.kernels.reference import ReferenceKernels
from shared.models.loader import open_checkpoint
from shared.models.moe import MoeLayer
from shared.models.presets import make_checkpoint

CPU = torch.device("cpu")


def test_compiling_loads_no_more_experts_than_one_row_needs(tmp_path: Path) -> None:
    make_checkpoint("tiny-qwen3", tmp_path)
    checkpoint = open_checkpoint(str(tmp_path))
    spec = checkpoint.spec
    layer = MoeLayer(checkpoint, ReferenceKernels(), CPU, torch.float32, spec.moe_layers[0])
    warm_up(layer, spec, CPU, torch.float32)
    assert 0 < len(layer.resident) <= spec.router.top_k < spec.router.experts
