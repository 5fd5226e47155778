"""The kernels for CUDA against the reference, on CPU tensors; what becomes of recordings, with pretended graphs."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from shared.kernels.base import Paged, select_kernels
from shared.kernels.cuda import CudaKernels
from shared.kernels.cuda_experts import StackedTable
from shared.kernels.reference import ReferenceKernels
from tests.pretended_graphs import Pretended
from tests.unit.kernel_cases import ExpertCase, expert_case, normal, paged_case

CPU = torch.device("cpu")
REFERENCE = ReferenceKernels()
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2}
"""Relative to the largest number: bf16 results are rounded to 8 bits, here and there at different points."""


def cuda() -> CudaKernels:
    return CudaKernels(CPU, Pretended())


def near(got: Tensor, want: Tensor, dtype: torch.dtype) -> None:
    torch.testing.assert_close(got, want, rtol=0, atol=TOLERANCE[dtype] * want.abs().max().item())


def in_dtype(case: ExpertCase, dtype: torch.dtype) -> ExpertCase:
    """Rows, and biases, as instances on a GPU have them: in the dtype of plain weights."""
    weights = {
        e: tuple(w.to(dtype) if isinstance(w, Tensor) else w for w in given) for e, given in case.experts.items()
    }
    return ExpertCase(case.x.to(dtype), weights, case.tokens, case.ids, case.activation)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("activation", ["silu", "gelu", "gelu_pytorch_tanh", "clamped_swiglu"])
@pytest.mark.parametrize("biased", [False, True])
def test_grouped_experts_are_the_reference(dtype: torch.dtype, activation: str, biased: bool) -> None:
    case = in_dtype(expert_case(13, dtype=dtype, activation=activation, biased=biased), dtype)
    near(case.run(cuda()), case.run(REFERENCE), dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", [1, 2, 40])
@pytest.mark.parametrize(("hidden", "inner"), [(64, 48), (40, 24), (36, 29), (7, 3)])
def test_grouped_experts_of_odd_sizes_are_the_reference(dtype: torch.dtype, rows: int, hidden: int, inner: int) -> None:
    case = in_dtype(expert_case(rows, hidden, inner, biased=True, dtype=dtype, seed=rows), dtype)
    near(case.run(cuda()), case.run(REFERENCE), dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("rows", "experts"), [(1, 11), (2, 3), (30, 11)])
@pytest.mark.parametrize(("hidden", "inner"), [(160, 144), (40, 27)])
def test_fp8_experts_are_the_reference(dtype: torch.dtype, rows: int, experts: int, hidden: int, inner: int) -> None:
    """More experts than are unpacked at once, blocks that do not divide the matrices, and experts without rows."""
    case = in_dtype(expert_case(rows, hidden, inner, experts, dtype=torch.float8_e4m3fn), dtype)
    blocks = [weight.block for weight in case.experts[0]]  # pyright: ignore[reportAttributeAccessIssue]
    same = {e: w for e, w in case.experts.items() if [part.block for part in w] == blocks}  # pyright: ignore
    ids = [i for i, e in enumerate(case.ids.tolist()) if e in same]
    case = ExpertCase(case.x, same, case.tokens[ids], case.ids[ids])
    near(case.run(cuda()), case.run(REFERENCE), dtype)


def test_fp8_experts_keep_one_byte_per_weight() -> None:
    case = expert_case(4, 256, 128, experts=1, dtype=torch.float8_e4m3fn)
    weights = case.experts[0]
    kept = cuda().expert_table(dict.fromkeys(range(5), weights)).nbytes
    assert kept == 5 * sum(weight.nbytes for weight in weights)


def test_no_parts_leave_the_output_alone() -> None:
    case = in_dtype(expert_case(3), torch.bfloat16)
    nothing, out = torch.empty(0, dtype=torch.int32), torch.empty(0, 64)
    kernels = cuda()
    assert kernels.experts(case.x, kernels.expert_table(case.experts), nothing, nothing, "silu", out) is out


def test_one_expert_is_not_copied() -> None:
    case = in_dtype(expert_case(5, experts=1, top_k=1), torch.bfloat16)
    kernels = cuda()
    table = kernels.expert_table(case.experts)
    assert not isinstance(table, StackedTable)
    assert case.run(kernels).equal(case.run(REFERENCE))


def test_experts_come_and_go_and_keep_their_slots() -> None:
    """Each table computes right also while the next one is being filled; stacks grow only when no slot is free."""
    case = in_dtype(expert_case(20, experts=6, biased=True), torch.bfloat16)
    kernels, want = cuda(), case.run(REFERENCE)
    few = [i for i, e in enumerate(case.ids.tolist()) if e in (0, 2, 4)]

    def check(table: Any, parts: list[int]) -> None:
        out = torch.full((len(parts), 64), float("nan"))
        kernels.experts(case.x, table, case.tokens[parts], case.ids[parts], "silu", out)
        near(out, want[parts], torch.bfloat16)

    table = kernels.expert_table({0: case.experts[0]})
    for first, second in ((2, 4), (6, 8)):
        earlier, table = table, kernels.expert_table({e: case.experts[e] for e in (first, second)}, table)
        assert isinstance(table, StackedTable)
        check(table, few)
    assert table.resident == {0, 2, 4, 6, 8}
    check(earlier, few)
    size = table.nbytes
    table = table.without(frozenset({6, 8, 10}))
    assert table.resident == {0, 2, 4}
    table = kernels.expert_table({10: case.experts[10]}, table)
    assert table.nbytes == size
    check(table, [i for i, e in enumerate(case.ids.tolist()) if e in (0, 2, 4, 10)])
    table = kernels.expert_table({e: case.experts[e] for e in (6, 8)}, table)
    assert table.nbytes == size // 5 * 6
    check(table, list(range(len(case.ids))))


def test_unlike_experts_are_refused() -> None:
    plain, packed = expert_case(1).experts, expert_case(1, dtype=torch.float8_e4m3fn).experts
    other = expert_case(1, inner=40).experts
    for unlike in (packed[0], other[0]):
        with pytest.raises(ValueError, match="differ"):
            cuda().expert_table({0: plain[0], 2: unlike})
    with pytest.raises(TypeError, match="rows are"):
        expert_case(3).run(cuda())  # fp32 rows, bf16 weights
    with pytest.raises(TypeError, match="other kernels"):
        cuda().expert_table(plain, select_kernels(CPU, 1).expert_table(plain))


ATTENTION = {
    "plain": {},
    "window": {"window": 5},
    "chunk": {"chunk": 7},
    "sinks": {"sinks": True, "window": 9},
    "one kv head, narrow values": {"kv_heads": 1, "width": 16},
}


@pytest.mark.parametrize("kind", ATTENTION)
@pytest.mark.parametrize("rows", ["all", "decode", "mixed", "one sequence", "some"])
def test_attention_is_the_reference(kind: str, rows: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """In pieces and at once; blocks that no sequence uses hold NaN."""
    case = paged_case([37] if rows == "one sequence" else [20, 1, 33, 6], **ATTENTION[kind])
    last = [19, 20, 53, 59]
    chosen = {"decode": last, "mixed": [19, 20, *range(40, 54), 59], "some": [3, 3, 50, 51]}.get(rows)
    case = case.rows(chosen) if chosen else case
    want = case.run(REFERENCE)
    torch.testing.assert_close(case.run(cuda()), want, rtol=1e-5, atol=1e-5)
    monkeypatch.setattr("shared.kernels.cuda_attention.MOST_GATHERED", 100)
    monkeypatch.setattr("shared.kernels.cuda_attention.MOST_SCORES", 100)
    torch.testing.assert_close(case.run(cuda()), want, rtol=1e-5, atol=1e-5)


def test_no_rows_are_no_trouble() -> None:
    case = paged_case([3])
    nothing = case.rows([])
    assert nothing.run(cuda()).shape == (0, 128)


def attend_later(kernels: CudaKernels, sequence: list[int]) -> Callable[[], Tensor]:
    case = paged_case([4, 4])
    at = Paged(case.tables, torch.tensor(sequence, dtype=torch.int32), torch.tensor([3] * len(sequence)).int())
    out, q = torch.empty(len(sequence), 128), case.q[: len(sequence)]
    return kernels.record(lambda: kernels.attention(q, case.caches, at, case.sees, out))


def test_a_recording_runs_then_is_captured_then_replayed() -> None:
    pretended, x, y = Pretended(), torch.zeros(3), torch.ones(3)
    kernels = CudaKernels(CPU, pretended)
    again = kernels.record(lambda: kernels.add(x, y))
    for time in range(1, 5):
        again()
        assert x.eq(time).all()
        assert pretended.captured == (time > 1)


@pytest.mark.parametrize(("sequence", "captured"), [([0, 1], 1), ([0, 1, 1], 0)])
def test_steps_that_mix_prompts_and_decode_are_not_captured(sequence: list[int], captured: int) -> None:
    pretended = Pretended()
    again = attend_later(CudaKernels(CPU, pretended), sequence)
    for _ in range(4):
        again()
    assert pretended.captured == captured


def test_a_capture_that_fails_is_an_error_every_time() -> None:
    class Refusing(Pretended):
        def capture(self, call: Callable[[], Any]) -> Callable[[], Any]:
            raise RuntimeError("operation not permitted when stream is capturing")

    x = normal(2, seed=0)
    again = CudaKernels(CPU, Refusing()).record(lambda: x.add_(1))
    again()
    for _ in range(2):
        with pytest.raises(RuntimeError, match="not permitted"):
            again()
