"""The exchange of a monolith: the sum over all chosen experts, without anybody to wait for."""

import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from services.attention.exchange import View
from services.attention.local_exchange import LocalExchange
from shared.kernels.base import Kernels
from shared.kernels.cpu import CpuKernels
from shared.kernels.reference import ReferenceKernels
from shared.models.loader import Checkpoint, open_checkpoint
from shared.models.local import LocalExperts
from shared.models.moe import MoeLayer
from tests.parity.families import config, save_random

CPU = torch.device("cpu")


@pytest.fixture(scope="module", params=["qwen3_moe", "llama4_text"])
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    """llama4 weighs the experts' inputs, the others their outputs."""
    path: Path = tmp_path_factory.mktemp("local") / request.param
    more = {"num_experts_per_tok": 2} if request.param == "llama4_text" else {}
    save_random(config(request.param, **more), path)
    return open_checkpoint(str(path))


def make_exchange(checkpoint: Checkpoint, kernels: Kernels) -> LocalExchange:
    return LocalExchange(LocalExperts(checkpoint, kernels, CPU, torch.float32))


def one_by_one(moe: MoeLayer, row: Tensor) -> Tensor:
    """What row [1, H] gets: expert after expert in ascending order."""
    weights, ids = moe.gate(row)
    total, first = torch.zeros(row.shape[1]), torch.zeros(1, dtype=torch.int32)
    for j in ids[0].argsort().tolist():
        part = torch.empty(1, row.shape[1])
        moe.forward(row, first, ids[0, j : j + 1], weights[0, j : j + 1], part)
        total += part[0] * (1.0 if moe.weighs_input else weights[0, j])
    return total


@pytest.mark.parametrize("kernels", [ReferenceKernels(), CpuKernels(threads=2)], ids=["reference", "cpu"])
def test_every_row_gets_its_experts_in_ascending_order(checkpoint: Checkpoint, kernels: Any) -> None:
    spec = checkpoint.spec
    exchange = make_exchange(checkpoint, kernels)
    generator = torch.Generator().manual_seed(3)
    with torch.inference_mode():
        for layer in spec.moe_layers:
            moe = MoeLayer(checkpoint, kernels, CPU, torch.float32, layer)
            moe.load(range(spec.router.experts))
            rows = torch.randn(9, spec.hidden, generator=generator)
            before = torch.randn(9, spec.hidden, generator=generator)
            x = before.clone()
            exchange.combine(exchange.dispatch(layer, rows), x)
            expected = torch.cat([one_by_one(moe, row[None])[None] for row in rows])
            torch.testing.assert_close(x - before, expected, atol=1e-5, rtol=1e-5)


def test_the_bits_of_a_row_do_not_depend_on_the_others(checkpoint: Checkpoint) -> None:
    spec = checkpoint.spec
    exchange = make_exchange(checkpoint, CpuKernels(threads=2))
    rows = torch.randn(40, spec.hidden, generator=torch.Generator().manual_seed(4))
    with torch.inference_mode():
        together = torch.zeros_like(rows)
        exchange.combine(exchange.dispatch(spec.moe_layers[0], rows), together)
        for i, row in enumerate(rows):
            alone = torch.zeros(1, spec.hidden)
            exchange.combine(exchange.dispatch(spec.moe_layers[0], row[None].contiguous()), alone)
            assert torch.equal(alone[0], together[i])


def test_a_monolith_is_always_ready_and_a_wake_before_or_during_a_wait_ends_it(checkpoint: Checkpoint) -> None:
    exchange = make_exchange(checkpoint, ReferenceKernels())
    exchange.update(View())
    assert exchange.ready()
    exchange.wake()
    exchange.idle_wait(60)
    waiting = threading.Thread(target=exchange.idle_wait, args=(60,), daemon=True)
    waiting.start()
    exchange.wake()
    waiting.join(30)
    assert not waiting.is_alive()
