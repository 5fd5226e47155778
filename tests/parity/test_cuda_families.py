"""Every family with the kernels for CUDA, without a GPU: logits on CPU tensors, and that decode can be captured.

The latter on tensors without data ("meta"): whoever looks at a value there fails. tests/gpu shows the rest.
"""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from shared.kernels.cuda import CudaKernels
from shared.kernels.reference import ReferenceKernels
from shared.models.decoder import Decoder, StepInput
from shared.models.loader import open_checkpoint
from shared.models.moe import MoeLayer
from tests.parity.families import FAMILIES, config, save_random
from tests.parity.test_local_models import paged_logits
from tests.parity.test_stored_forms import make_fp8
from tests.pretended_graphs import Pretended

CPU, META = torch.device("cpu"), torch.device("meta")


class NoLiterals(TorchFunctionMode):
    """Fails when a tensor is made of numbers on the host: their copy to a GPU cannot be captured."""

    def __torch_function__(self, func, types, args=(), kwargs=None) -> Any:
        if func in (torch.tensor, torch.as_tensor, torch.from_numpy):
            raise AssertionError(f"{func} copies from the host")
        return func(*args, **(kwargs or {}))


class OneDevice(TorchDispatchMode):
    """Fails when an operation takes or gives a tensor of another device than "meta"."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None) -> Any:
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        if any(t.device != META for t in tensors):
            raise AssertionError(f"{func} copies from the host")
        result = func(*args, **(kwargs or {}))
        if any(t.device != META for t in tree_leaves(result) if isinstance(t, Tensor)):
            raise AssertionError(f"{func} computes on the host")
        return result


def decode(path: Path, rows: int, sequences: int) -> CudaKernels:
    """All that is recorded of a step, on tensors without data; the second time as in a capture."""
    checkpoint, kernels = open_checkpoint(str(path)), CudaKernels(META)
    decoder = Decoder(checkpoint, kernels, META, torch.bfloat16, 64)
    gates = {i: MoeLayer(checkpoint, kernels, META, torch.bfloat16, i) for i in checkpoint.spec.moe_layers}
    cache = decoder.new_cache(16, 4)
    long, short = (torch.zeros(rows, dtype=dtype, device=META) for dtype in (torch.int64, torch.int32))
    step = StepInput(long, short, long, short, torch.zeros(sequences, 8, dtype=torch.int32, device=META), long)
    x, out = decoder.new_rows(rows), decoder.new_rows(rows)

    def everything() -> None:
        decoder.embed(step, x)
        for layer in checkpoint.spec.layers:
            decoder.attend(layer.index, x, step, cache, out)
            if layer.moe:
                gates[layer.index]._route(out)  # pyright: ignore[reportPrivateUsage]
            (decoder.shared if layer.moe else decoder.dense)(layer.index, out, x)
        decoder.logits(x, step)

    everything()
    with NoLiterals(), OneDevice():
        everything()
    return kernels


def difference(path: Path, sequences: list[Tensor]) -> float:
    """Largest one of logits from those with the reference's kernels."""
    kernels = CudaKernels(CPU, Pretended()), ReferenceKernels()
    ours, theirs = (paged_logits(path, sequences, 8, 24, each) for each in kernels)
    return max(float((a - b).abs().max()) for a, b in zip(ours, theirs, strict=True))


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_are_the_reference_and_decode_looks_at_nothing_on_the_host(family: str, tmp_path: Path) -> None:
    save_random(config(family), tmp_path)
    sequences = [torch.randint(97, (n,), generator=torch.Generator().manual_seed(n)) for n in (37, 5, 44)]
    assert difference(tmp_path, sequences) < 1e-4
    for rows, sequences_of_step in ((3, 3), (5, 1)):
        kernels = decode(tmp_path, rows, sequences_of_step)
        assert kernels._host_reads == 0  # pyright: ignore[reportPrivateUsage]


def test_fp8_projections_look_at_nothing_on_the_host(tmp_path: Path) -> None:
    packed = make_fp8(tmp_path)[0]
    assert decode(packed, 3, 3)._host_reads == 0  # pyright: ignore[reportPrivateUsage]
    sequences = [torch.arange(n) % 97 for n in (30, 9)]
    assert difference(packed, sequences) < 1e-4


def test_a_look_at_the_host_would_be_noticed(tmp_path: Path) -> None:
    """As in steps that mix prompts and decode."""
    save_random(config("mixtral", num_hidden_layers=1), tmp_path)
    with pytest.raises((RuntimeError, NotImplementedError)):
        decode(tmp_path, 3, 2)
    with pytest.raises(AssertionError, match="copies from the host"), NoLiterals():
        torch.tensor([1.0, 2.0], device=META)
    indices = torch.arange(2)
    with pytest.raises(AssertionError, match="copies from the host"), OneDevice():
        torch.zeros(2, device=META)[indices]
