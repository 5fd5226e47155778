"""A real mesh beside transformers' model of the same checkpoint, for every file that compares the two."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from shared.models.presets import make_checkpoint
from shared.models.source import DEMO
from tests.mesh import RunningMesh, running_mesh

MODELS = ["tiny-qwen3", "tiny-mixtral", "demo"]


@pytest.fixture(scope="package", params=MODELS)
def served(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[RunningMesh, Any]]:
    """A 1A2E mesh in fp32 and transformers' model of the same checkpoint."""
    path = DEMO
    if request.param != "demo":
        path = tmp_path_factory.mktemp("model") / request.param
        make_checkpoint(request.param, path)
    reference = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, attn_implementation="eager").eval()
    with running_mesh(model=str(path), attention=1, experts=2, mesh="parity", settings={"dtype": "float32"}) as mesh:
        yield mesh, reference
