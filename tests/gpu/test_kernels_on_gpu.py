"""On a GPU: grouped experts and attention are the reference's to rounding; graphs give the bits of eager calls."""

import threading
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from shared.kernels.base import Kernels, Paged, select_kernels
from shared.kernels.cuda import CudaKernels
from shared.kernels.reference import ReferenceKernels
from shared.kernels.weights import Weight
from shared.models.decoder import Decoder, StepInput
from shared.models.loader import open_checkpoint
from shared.models.moe import MoeLayer
from shared.models.presets import make_checkpoint
from tests.parity.families import config, save_random
from tests.unit.kernel_cases import ExpertCase, expert_case, normal, paged_case

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
GPU = torch.device("cuda")
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 2e-2}
"""Relative to the largest number."""
BLOCK = 4


def kernels() -> Kernels:
    return select_kernels(GPU, 1)


def moved(weight: Weight, dtype: torch.dtype) -> Weight:
    return weight.to(GPU, dtype) if isinstance(weight, Tensor) else weight.to(GPU)


def run(made: Kernels, case: ExpertCase, dtype: torch.dtype) -> Tensor:
    table = made.expert_table({e: [moved(w, dtype) for w in weights] for e, weights in case.experts.items()})
    x, tokens, ids = case.x.to(GPU, dtype), case.tokens.to(GPU), case.ids.to(GPU)
    return made.experts(x, table, tokens, ids, case.activation, torch.empty(len(ids), case.x.shape[1], device=GPU))


def near(got: Tensor, want: Tensor, dtype: torch.dtype) -> None:
    torch.testing.assert_close(got, want, rtol=0, atol=TOLERANCE[dtype] * want.abs().max().item())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", [1, 3, 64, 700])
@pytest.mark.parametrize(("hidden", "inner"), [(64, 48), (1024, 512), (36, 29)])
def test_grouped_experts_are_the_reference(dtype: torch.dtype, rows: int, hidden: int, inner: int) -> None:
    case = expert_case(rows, hidden, inner, experts=12, dtype=dtype, biased=True)
    near(run(kernels(), case, dtype), run(ReferenceKernels(), case, dtype), dtype)


@pytest.mark.parametrize("rows", [1, 64])
def test_fp8_experts_are_the_reference(rows: int) -> None:
    case = expert_case(rows, 256, 128, experts=1, top_k=1, dtype=torch.float8_e4m3fn)
    ids = torch.arange(rows).remainder(12).int().sort().values
    case = ExpertCase(case.x, dict.fromkeys(range(12), case.experts[0]), case.tokens, ids)
    near(run(kernels(), case, torch.bfloat16), run(ReferenceKernels(), case, torch.bfloat16), torch.bfloat16)


@pytest.mark.parametrize("lengths", [[50], [20, 1, 33, 6]])
@pytest.mark.parametrize("kind", [{}, {"window": 5}, {"chunk": 7}, {"sinks": True}, {"kv_heads": 1, "width": 16}])
def test_attention_is_the_reference(lengths: list[int], kind: dict[str, Any]) -> None:
    case = paged_case(lengths, **kind)
    want = case.run(ReferenceKernels())
    at = Paged(*(tensor.to(GPU) for tensor in (case.tables, case.sequence, case.positions)))
    caches = case.caches[0].to(GPU), case.caches[1].to(GPU)
    sinks = case.sees.sinks
    case.sees.__dict__["sinks"] = None if sinks is None else sinks.to(GPU)
    got = kernels().attention(case.q.to(GPU), caches, at, case.sees, torch.empty(want.shape, device=GPU))
    near(got.cpu(), want, torch.float32)


def decode_step(rows: int, seed: int) -> StepInput:
    """One row for each of some sequences, at random positions."""
    made = torch.Generator().manual_seed(seed)
    tables = torch.arange(rows * 4, dtype=torch.int32).view(rows, 4)
    positions = torch.randint(4 * BLOCK, (rows,), generator=made)
    each = torch.arange(rows)
    slots = tables[each, positions // BLOCK].long() * BLOCK + positions % BLOCK
    tensors = torch.randint(97, (rows,), generator=made), positions.int(), slots, each.int(), tables, each
    return StepInput(*(tensor.to(GPU) for tensor in tensors))


class Side:
    """What is recorded of steps of so many rows, recorded or not, with a cache of its own."""

    def __init__(self, decoder: Decoder, rows: int, recorded: bool) -> None:
        self.cache, self.step = decoder.new_cache(rows * 4, BLOCK), decode_step(rows, 0)
        self.x, self.rows = decoder.new_rows(rows), decoder.new_rows(rows)
        calls: list[Callable[[], Any]] = [partial(decoder.embed, self.step, self.x)]
        for layer in decoder.spec.layers:
            calls.append(partial(decoder.attend, layer.index, self.x, self.step, self.cache, self.rows))
            calls.append(partial(decoder.shared if layer.moe else decoder.dense, layer.index, self.rows, self.x))
        calls.append(partial(decoder.logits, self.x, self.step))
        self.calls = [decoder.kernels.record(call) for call in calls] if recorded else calls

    def __call__(self, step: StepInput) -> Tensor:
        """Logits."""
        for mine, new in zip(vars(self.step).values(), vars(step).values(), strict=True):
            mine.copy_(new)
        return [call() for call in self.calls][-1].clone()


@pytest.mark.parametrize("family", ["qwen2_moe", "deepseek_v3", "llama4_text", "gpt_oss", "phimoe"])
@torch.inference_mode()
def test_replayed_decode_has_the_bits_of_eager_decode(family: str, tmp_path: Path) -> None:
    """Runs, is captured, is replayed: each time on other tokens and positions; also after buffers have grown."""
    save_random(config(family), tmp_path, dtype=torch.bfloat16)
    decoder = Decoder(open_checkpoint(str(tmp_path)), kernels(), GPU, torch.bfloat16, 64)
    sides = {rows: [Side(decoder, rows, recorded) for recorded in (False, True)] for rows in (5, 1, 64)}
    for seed in range(5):
        for rows, (eager, recorded) in sides.items():
            step = decode_step(rows, seed)
            assert recorded(step).equal(eager(step))
            assert recorded.x.equal(eager.x) and recorded.rows.equal(eager.rows)
            for mine, its in zip(recorded.cache.k + recorded.cache.v, eager.cache.k + eager.cache.v, strict=True):
                assert mine.equal(its)


def test_gates_are_captured_while_another_thread_loads_experts(tmp_path: Path) -> None:
    make_checkpoint("tiny-qwen3", tmp_path / "model")
    checkpoint = open_checkpoint(str(tmp_path / "model"))
    made = kernels()
    assert isinstance(made, CudaKernels)
    layer = MoeLayer(checkpoint, made, GPU, torch.bfloat16, checkpoint.spec.moe_layers[0])
    stop = threading.Event()

    def load() -> None:
        while not stop.is_set():
            layer.load(range(checkpoint.spec.router.experts))
            layer.unload(range(checkpoint.spec.router.experts))

    loader = threading.Thread(target=load)
    loader.start()
    try:
        with torch.inference_mode():
            for count in range(1, 20):
                for seed in range(3):
                    rows = normal(count, checkpoint.spec.hidden, seed=seed, dtype=torch.bfloat16).to(GPU)
                    want = [tensor.clone() for tensor in layer._route(rows)]  # pyright: ignore[reportPrivateUsage]
                    assert all(a.equal(b) for a, b in zip(layer.gate(rows), want, strict=True))
    finally:
        stop.set()
        loader.join()


def test_a_call_that_waits_for_the_device_is_refused_by_name() -> None:
    x = torch.ones(3, device=GPU)
    again = kernels().record(lambda: x.sum().item())
    assert again() == 3
    with pytest.raises(RuntimeError, match="captur"):
        again()
    torch.cuda.synchronize()
    assert x.sum().item() == 3  # the device is as it was
