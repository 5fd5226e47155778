"""CPU kernels against the reference, over odd shapes; and what they refuse."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from shared.kernels.base import Kernels, Paged, Visibility
from shared.kernels.cpu import CpuKernels
from shared.kernels.reference import ReferenceKernels, activate
from shared.kernels.weights import Fp8Blocks
from shared.models.spec import RouterSpec
from tests.unit.kernel_cases import MATRIX_DTYPES, WEIGHT_DTYPES, expert_case, matrix, normal, paged_case

REFERENCE = ReferenceKernels()
few = settings(max_examples=25, deadline=None)
sizes = st.integers(1, 70)
seeds = st.integers(0, 1000)


@pytest.fixture(scope="module", params=[True, False], ids=["tiles", "plain"])
def cpu(request: pytest.FixtureRequest) -> CpuKernels:
    return CpuKernels(2, request.param)


def assert_close(ours: Tensor, theirs: Tensor) -> None:
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=2e-5)


@few
@given(rows=sizes, depth=sizes, cols=sizes, dtype=st.sampled_from(MATRIX_DTYPES), bias=st.booleans(), seed=seeds)
def test_linear_is_the_reference(
    cpu: CpuKernels, rows: int, depth: int, cols: int, dtype: torch.dtype, bias: bool, seed: int
) -> None:
    x, weight = normal(rows, depth, seed=seed), matrix(cols, depth, seed + 1, dtype)
    offsets = normal(cols, seed=seed + 2).to(WEIGHT_DTYPES[seed % 3]) if bias else None
    out = torch.full((rows, cols), float("nan"))
    assert cpu.linear(x, weight, offsets, out=out) is out
    assert_close(out, REFERENCE.linear(x, weight, offsets))


@pytest.mark.parametrize("dtype", MATRIX_DTYPES)
def test_linear_is_the_reference_with_many_rows(cpu: CpuKernels, dtype: torch.dtype) -> None:
    x, weight = normal(203, 300, seed=0), matrix(130, 300, 0, dtype)
    assert_close(cpu.linear(x, weight), REFERENCE.linear(x, weight))


@pytest.mark.parametrize("rows", [1, 40])
def test_every_fp8_byte_is_the_number_it_stands_for(cpu: CpuKernels, rows: int) -> None:
    """NaN and subnormals included; factors so far from 1 that they need fp32."""
    values = torch.arange(256).to(torch.uint8).view(256, 1).repeat(1, 16).view(torch.float8_e4m3fn)
    pick = torch.zeros(rows, 16)
    pick[:, 3] = 1.0
    for factor in (1.0, 0.37, 1e-30, 1e30):
        weight = Fp8Blocks(values, torch.full((2, 1), factor), (128, 16))
        expected = values[:, 3].float() * factor
        assert expected.isnan().nonzero().flatten().tolist() == [0x7F, 0xFF]
        for row in (weight.unpacked()[:, 3], *cpu.linear(pick, weight)):
            torch.testing.assert_close(row, expected, rtol=0, atol=0, equal_nan=True)


def test_fp8_blocks_share_a_factor() -> None:
    values, factors = torch.ones(3, 4).to(torch.float8_e4m3fn), torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    weight = Fp8Blocks(values, factors, (2, 3))
    assert weight.unpacked().tolist() == [[1, 1, 1, 2], [1, 1, 1, 2], [3, 3, 3, 4]]
    assert weight.nbytes == 12 + 16


@pytest.mark.parametrize("kernels", [REFERENCE, CpuKernels(1)], ids=["reference", "cpu"])
def test_a_table_of_fp8_experts_keeps_one_byte_per_weight(kernels: CpuKernels | ReferenceKernels) -> None:
    hidden, inner, experts = 256, 128, 7
    case = expert_case(1, hidden, inner, experts, dtype=torch.float8_e4m3fn)
    factors = sum(w.factors.nbytes for weights in case.experts.values() for w in weights if isinstance(w, Fp8Blocks))
    assert kernels.expert_table(case.experts).nbytes == 3 * hidden * inner * experts + factors


@pytest.mark.parametrize("rows", [1, 3, 8, 9, 40])
def test_linear_with_bf16_weights_is_precise(cpu: CpuKernels, rows: int) -> None:
    x, weight = normal(rows, 1000, seed=0) * 10.0 ** normal(rows, 1000, seed=2), normal(70, 1000, seed=1).bfloat16()
    exact, size = x.double() @ weight.double().T, x.double().abs() @ weight.double().abs().T
    assert ((cpu.linear(x, weight).double() - exact).abs() <= 2.0**-20 * size).all()


@pytest.mark.parametrize("precise", [True, False])
@pytest.mark.parametrize("bits", [0x7FC00000, 0x7FFFFFFF, -1, 0x7F800001, 0x7F800000])
def test_what_is_not_finite_stays_so(precise: bool, bits: int) -> None:
    x = torch.ones(3, 64)
    x.view(torch.int32)[1, 5] = bits
    y = CpuKernels(1, precise=precise).linear(x, torch.ones(20, 64).bfloat16())
    assert (y[0] == 64).all()
    assert (y[1].isinf() if bits == 0x7F800000 else y[1].isnan()).all()
    assert (y[2] == 64).all()


@pytest.mark.parametrize("depth", [700, 33, 31, 1])
@pytest.mark.parametrize("rows", [1, 16, 17, 33, 100])
def test_rounded_rows_are_bf16_rows(rows: int, depth: int) -> None:
    rough, x = CpuKernels(1, precise=False), normal(rows, depth, seed=0)
    weight = normal(70, depth, seed=1).bfloat16()
    fine = REFERENCE.linear(x.bfloat16().float() if rough.tiles or rough.pairs else x, weight)
    torch.testing.assert_close(rough.linear(x, weight), fine, rtol=1e-4, atol=1e-4)


def test_linear_takes_rows_that_are_not_contiguous(cpu: CpuKernels) -> None:
    x, weight = normal(5, 40, seed=0), normal(8, 20, seed=1)
    assert_close(cpu.linear(x[:, ::2], weight), REFERENCE.linear(x[:, ::2], weight))


@few
@given(rows=sizes, depth=sizes, dtype=st.sampled_from(WEIGHT_DTYPES), seed=seeds)
def test_rms_norm_is_the_reference(cpu: CpuKernels, rows: int, depth: int, dtype: torch.dtype, seed: int) -> None:
    x, weight = normal(rows, 2, depth, seed=seed), normal(depth, seed=seed + 1, dtype=dtype)
    expected = REFERENCE.rms_norm(x, weight, 1e-6)
    assert_close(cpu.rms_norm(x, weight, 1e-6), expected)
    assert_close(cpu.rms_norm(x, weight, 1e-6, out=x), expected)


@few
@given(
    rows=sizes,
    heads=st.integers(1, 5),
    half=st.integers(1, 20),
    rest=st.integers(0, 7),
    pairs=st.booleans(),
    seed=seeds,
)
def test_rope_is_the_reference(
    cpu: CpuKernels, rows: int, heads: int, half: int, rest: int, pairs: bool, seed: int
) -> None:
    x = normal(rows, heads, 2 * half + rest, seed=seed)
    angles = normal(100, half, seed=seed + 1)
    positions = torch.randint(0, 100, (rows,), dtype=torch.int32)
    ours, theirs = x.clone(), x.clone()
    for kernels, rotated in ((cpu, ours), (REFERENCE, theirs)):
        kernels.rope(rotated, angles.cos(), angles.sin(), positions, pairs)
    assert_close(ours, theirs)
    assert torch.equal(ours[..., 2 * half :], x[..., 2 * half :])


@few
@given(rows=sizes, count=sizes, depth=sizes, dtype=st.sampled_from(WEIGHT_DTYPES), seed=seeds)
def test_take_is_the_reference(
    cpu: CpuKernels, rows: int, count: int, depth: int, dtype: torch.dtype, seed: int
) -> None:
    table, ids = normal(count, depth, seed=seed, dtype=dtype), torch.randint(0, count, (rows,))
    ours, theirs = torch.full((rows, depth), float("nan")), torch.empty(rows, depth)
    assert cpu.take(table, ids, ours) is ours
    assert torch.equal(ours, REFERENCE.take(table, ids, theirs))


def test_add_is_the_reference(cpu: CpuKernels) -> None:
    ours, theirs, y = normal(3, 37, seed=0), normal(3, 37, seed=0), normal(3, 37, seed=1)
    cpu.add(ours, y)
    REFERENCE.add(theirs, y)
    assert torch.equal(ours, theirs)


def test_add_scales_what_it_adds(cpu: CpuKernels) -> None:
    ours, y = normal(3, 37, seed=0), normal(3, 37, seed=1)
    expected = ours + 0.3 * y
    cpu.add(ours, y, 0.3)
    assert_close(ours, expected)


@few
@given(rows=sizes, depth=sizes, seed=seeds)
def test_arithmetic_on_rows_is_the_reference(cpu: CpuKernels, rows: int, depth: int, seed: int) -> None:
    gate, factors = normal(rows, 1, seed=seed + 2) * 5, normal(9, seed=seed + 3)
    index = torch.randint(0, 9, (rows,), dtype=torch.int32)
    results = []
    for kernels in (cpu, REFERENCE):
        x = normal(rows, depth, seed=seed)
        kernels.gated_add(x, normal(rows, depth, seed=seed + 1), gate)
        kernels.scale(x, 1.7)
        kernels.scale_rows(x, factors, index)
        kernels.clip(x, 0.9)
        results.append(x)
    assert_close(*results)


@few
@given(rows=sizes, depth=sizes, dtype=st.sampled_from(WEIGHT_DTYPES), seed=seeds)
def test_layer_norm_is_the_reference(cpu: CpuKernels, rows: int, depth: int, dtype: torch.dtype, seed: int) -> None:
    x, weight, bias = (
        normal(rows, depth, seed=seed),
        normal(depth, seed=1, dtype=dtype),
        normal(depth, seed=2, dtype=dtype),
    )
    expected = REFERENCE.layer_norm(x, weight, bias, 1e-3)
    assert_close(cpu.layer_norm(x, weight, bias, 1e-3), expected)
    assert_close(cpu.layer_norm(x, weight, bias, 1e-3, out=x), expected)


@few
@given(rows=sizes, heads=st.integers(1, 5), depth=sizes, cols=st.integers(1, 150), gap=st.integers(0, 5), seed=seeds)
def test_head_linear_is_the_reference_in_and_out_of_views(
    cpu: CpuKernels, rows: int, heads: int, depth: int, cols: int, gap: int, seed: int
) -> None:
    x, weight = normal(rows, heads, depth, seed=seed), normal(heads, cols + gap, depth, seed=seed + 1)[:, gap:]
    ours, theirs = normal(rows, heads, cols + gap, seed=2), normal(rows, heads, cols + gap, seed=2)
    cpu.head_linear(x, weight, ours[..., :cols])
    REFERENCE.head_linear(x, weight, theirs[..., :cols])
    assert_close(ours, theirs)


def test_norm_rotation_and_copy_work_on_parts_of_rows(cpu: CpuKernels) -> None:
    gain, angles, positions = normal(10, seed=1), normal(7, 3, seed=2), torch.tensor([6, 0, 3], dtype=torch.int32)
    results = []
    for kernels in (cpu, REFERENCE):
        x, copied = normal(3, 16, seed=0), torch.zeros(3, 2, 9)
        kernels.rms_norm(x[:, :10], gain, 1e-6, out=x[:, :10])
        heads = x.view(3, 2, 8)
        kernels.rope(heads[..., 2:], angles.cos(), angles.sin(), positions, interleaved=True)
        kernels.copy(heads[..., 1:6], copied[..., 4:])
        results.append(torch.cat([x.flatten(), copied.flatten()]))
    assert_close(*results)


def test_store_kv_writes_its_slots_and_nothing_else(cpu: CpuKernels) -> None:
    ours, theirs = normal(5, 3, 2, 6, seed=0), normal(5, 3, 2, 6, seed=0)
    rows, slots = normal(4, 2, 6, seed=1), torch.tensor([14, 0, 7, 3])
    cpu.store_kv(ours, rows, slots)
    REFERENCE.store_kv(theirs, rows, slots)
    assert torch.equal(ours, theirs)


@few
@given(
    lengths=st.lists(st.integers(1, 40), min_size=1, max_size=4),
    kv_heads=st.integers(1, 3),
    group=st.integers(1, 9),
    depth=st.integers(1, 40).map(lambda half: 2 * half),
    block_size=st.integers(1, 17),
    window=st.sampled_from((0, 1, 5, 30)),
    chunk=st.sampled_from((0, 1, 7)),
    sinks=st.booleans(),
    width=st.sampled_from((0, 1, 35)),
    seed=seeds,
)
def test_attention_is_the_reference(
    cpu: CpuKernels,
    lengths: list[int],
    kv_heads: int,
    group: int,
    depth: int,
    block_size: int,
    window: int,
    chunk: int,
    sinks: bool,
    width: int,
    seed: int,
) -> None:
    case = paged_case(lengths, kv_heads * group, kv_heads, depth, block_size, window, seed, chunk, sinks, width)
    clean = replace(case, caches=(case.caches[0].nan_to_num(), case.caches[1].nan_to_num()))
    assert_close(case.run(cpu), clean.run(REFERENCE))


def test_attention_with_huge_scores_stays_finite(cpu: CpuKernels) -> None:
    case = paged_case([50])
    case.q.mul_(1e4)
    assert case.run(cpu).isfinite().all()


@few
@given(
    rows=sizes,
    groups=st.integers(1, 4),
    size=st.integers(2, 10),
    score=st.sampled_from(("softmax", "sigmoid", "top_softmax", "top_sigmoid", "sparsemixer")),
    normalise=st.booleans(),
    bias=st.booleans(),
    correction=st.booleans(),
    group_score=st.sampled_from(("max", "top2")),
    data=st.data(),
    seed=seeds,
)
def test_route_is_the_reference(
    cpu: CpuKernels,
    rows: int,
    groups: int,
    size: int,
    score: str,
    normalise: bool,
    bias: bool,
    correction: bool,
    group_score: str,
    data: st.DataObject,
    seed: int,
) -> None:
    groups, experts = (1, size) if score == "sparsemixer" else (groups, groups * size)
    kept = data.draw(st.integers(1, groups))
    top_k = data.draw(st.integers(1, min(kept * size, 8)))
    router = RouterSpec(
        experts, top_k, score, normalise, scale=1.3, bias=bias, correction=correction, groups=groups, top_groups=kept,
        group_score=group_score, jitter=0.2,
    )  # fmt: skip
    x, weight = normal(rows, 33, seed=seed), normal(experts, 33, seed=seed + 1, dtype=torch.bfloat16) * 0.2
    extra = (normal(experts, seed=5) if bias else None, normal(experts, seed=6) if correction else None)
    (ours, our_ids), (theirs, their_ids) = (kernels.route(x, weight, router, *extra) for kernels in (cpu, REFERENCE))
    assert torch.equal(our_ids, their_ids)
    assert_close(ours, theirs)


@pytest.mark.parametrize("kernels", [CpuKernels(1), REFERENCE], ids=["cpu", "reference"])
def test_route_gives_ties_to_the_lowest_id(kernels: CpuKernels | ReferenceKernels) -> None:
    weight = torch.zeros(9, 4)
    weight[[2, 5, 7]] = 1.0
    weights, ids = kernels.route(torch.ones(3, 4), weight, RouterSpec(9, 5))
    assert ids.tolist() == [[2, 5, 7, 0, 1]] * 3
    assert weights.dtype == torch.float32 and ids.dtype == torch.int32
    assert weights[0, 0] == weights[0, 2]


def test_route_of_rows_that_are_not_numbers_still_names_distinct_experts(cpu: CpuKernels) -> None:
    _, ids = cpu.route(torch.full((1, 4), float("nan")), torch.ones(5, 4), RouterSpec(5, 3))
    assert sorted(ids[0].tolist()) == [0, 1, 2]


@few
@given(
    rows=sizes,
    hidden=sizes,
    inner=sizes,
    dtype=st.sampled_from(MATRIX_DTYPES),
    activation=st.sampled_from(("silu", "gelu", "gelu_pytorch_tanh", "clamped_swiglu")),
    biased=st.booleans(),
    seed=seeds,
)
def test_experts_are_the_reference(
    cpu: CpuKernels, rows: int, hidden: int, inner: int, dtype: torch.dtype, activation: str, biased: bool, seed: int
) -> None:
    case = expert_case(rows, hidden, inner, dtype=dtype, activation=activation, biased=biased, seed=seed)
    assert_close(case.run(cpu), case.run(REFERENCE))


@pytest.mark.parametrize("activation", ["silu", "gelu", "gelu_pytorch_tanh", "clamped_swiglu"])
def test_activations_of_extreme_values_are_those_of_torch(cpu: CpuKernels, activation: str) -> None:
    x = torch.tensor([[-200.0, -100.0, -88.0, -20.0, -1e-30, 0.0, 1e-30, 20.0, 88.0, 100.0, 200.0]])
    identity = torch.eye(x.shape[1])
    up = identity[-1].repeat(x.shape[1], 1) / 200.0  # picks the last value, 200, and makes it 1
    first = torch.zeros(1, dtype=torch.int32)
    table = cpu.expert_table({0: (identity, up, identity)})
    out = cpu.experts(x, table, first, first, activation, torch.empty_like(x))
    assert_close(out, activate(x, torch.ones_like(x), activation))


def test_combine_sums_parts_from_several_frames_in_order(cpu: CpuKernels) -> None:
    frames = [normal(5, 19, seed=0), normal(8, 19, seed=1)]
    source = torch.tensor([[0, 1, 1], [1, 0, 0]], dtype=torch.int32)
    index = torch.tensor([[4, 7, 0], [1, 2, 3]], dtype=torch.int32)
    weights = normal(2, 3, seed=2)
    start = normal(2, 19, seed=3)
    ours, theirs = start.clone(), start.clone()
    cpu.combine(ours, frames, source, index, weights)
    REFERENCE.combine(theirs, frames, source, index, weights)
    assert torch.equal(ours, theirs)


def test_a_table_knows_what_is_resident_and_no_parts_cost_nothing(cpu: CpuKernels) -> None:
    case = expert_case(2)
    assert cpu.expert_table(case.experts).resident == frozenset(case.experts)
    assert cpu.expert_table({}).resident == frozenset()
    none = torch.zeros(0, dtype=torch.int32)
    table = cpu.expert_table(case.experts)
    assert cpu.experts(case.x, table, none, none, "silu", torch.empty(0, 64)).shape == (0, 64)


@pytest.mark.parametrize("kernels", [CpuKernels(1), REFERENCE], ids=["cpu", "reference"])
def test_a_table_made_beside_another_has_the_experts_of_both(kernels: Kernels) -> None:
    case = expert_case(9)
    want, out = case.run(kernels), torch.empty(len(case.ids), case.x.shape[1])
    some = {e: weights for e, weights in case.experts.items() if e < 6}
    others = {e: weights for e, weights in case.experts.items() if e >= 6}
    table = kernels.expert_table(others, kernels.expert_table(some))
    assert table.nbytes == kernels.expert_table(case.experts).nbytes
    assert kernels.experts(case.x, table, case.tokens, case.ids, case.activation, out).equal(want)
    less = table.without(frozenset({2, 4, 99}))
    assert less.resident == case.experts.keys() - {2, 4}
    again = kernels.expert_table({e: case.experts[e] for e in (2, 4)}, less)
    assert kernels.experts(case.x, again, case.tokens, case.ids, case.activation, out.zero_()).equal(want)


def test_no_rows_are_no_trouble(cpu: CpuKernels) -> None:
    nothing, none = torch.empty(0, 8), torch.zeros(0, dtype=torch.int32)
    assert cpu.linear(nothing, torch.ones(3, 8)).shape == (0, 3)
    assert cpu.rms_norm(nothing, torch.ones(8), 1e-6).shape == (0, 8)
    assert cpu.route(nothing, torch.ones(3, 8), RouterSpec(3, 2))[1].shape == (0, 2)
    cache = torch.zeros(1, 2, 1, 8)
    tables = torch.zeros(1, 1, dtype=torch.int32)
    at = Paged(tables, none, none)
    assert cpu.attention(nothing.view(0, 1, 8), (cache, cache), at, Visibility(1.0), nothing) is nothing


class TestRefused:
    """Anything that would read or write outside the tensors is refused before it happens."""

    def test_shapes_that_do_not_fit(self, cpu: CpuKernels) -> None:
        with pytest.raises(ValueError, match="weight"):
            cpu.linear(torch.ones(2, 5), torch.ones(3, 6))
        with pytest.raises(ValueError, match="out"):
            cpu.linear(torch.ones(2, 5), torch.ones(3, 5), out=torch.empty(2, 4))

    def test_weights_of_another_dtype(self, cpu: CpuKernels) -> None:
        with pytest.raises(TypeError, match="float64"):
            cpu.linear(torch.ones(2, 5), torch.ones(3, 5, dtype=torch.float64))
        with pytest.raises(TypeError, match="float8"):  # without its factors
            cpu.linear(torch.ones(2, 5), torch.ones(3, 5).to(torch.float8_e4m3fn))

    def test_fp8_values_without_the_factors_of_all_blocks(self) -> None:
        values = torch.ones(3, 5).to(torch.float8_e4m3fn)
        wrong = (torch.ones(1, 2), torch.ones(2, 3).t(), torch.ones(2, 3, dtype=torch.bfloat16), torch.ones(6))
        for factors in wrong:
            with pytest.raises(ValueError, match="factors"):
                Fp8Blocks(values, factors, (2, 2))
        with pytest.raises(ValueError, match="factors"):
            Fp8Blocks(values.t(), torch.ones(3, 2), (2, 2))

    def test_experts_of_mixed_dtypes(self, cpu: CpuKernels) -> None:
        plain, packed = expert_case(1).experts, expert_case(1, dtype=torch.float8_e4m3fn).experts
        with pytest.raises(ValueError, match="expert 2"):
            cpu.expert_table({0: plain[0], 2: packed[2]})
        with pytest.raises(ValueError, match="expert 0"):
            cpu.expert_table({0: (*packed[0][:2], plain[0][2])})

    def test_slots_and_positions_outside_the_cache(self, cpu: CpuKernels) -> None:
        with pytest.raises(ValueError, match="slots"):
            cpu.store_kv(torch.zeros(2, 3, 1, 4), torch.ones(1, 1, 4), torch.tensor([6]))
        with pytest.raises(ValueError, match="ids"):
            cpu.take(torch.ones(3, 4), torch.tensor([-1]), torch.empty(1, 4))
        angles = torch.zeros(4, 2)
        with pytest.raises(ValueError, match="positions"):
            cpu.rope(torch.ones(1, 1, 4), angles, angles, torch.tensor([4], dtype=torch.int32))

    def test_a_row_beyond_its_block_table(self, cpu: CpuKernels) -> None:
        case = paged_case([20], block_size=4)
        case.tables[0, 3] = 99
        with pytest.raises(ValueError, match="block"):
            case.run(cpu)

    def test_experts_that_are_not_resident_or_not_sorted(self, cpu: CpuKernels) -> None:
        case = expert_case(4)
        for ids in (case.ids + 1, case.ids.flip(0)):
            table, out = cpu.expert_table(case.experts), torch.empty(len(ids), 64)
            with pytest.raises(ValueError, match="resident"):
                cpu.experts(case.x, table, case.tokens, ids, "silu", out)

    def test_parts_that_were_not_given(self, cpu: CpuKernels) -> None:
        first = torch.zeros(1, 1, dtype=torch.int32)
        for source, index in ((first + 1, first), (first, first + 3)):
            with pytest.raises(ValueError, match="rows"):
                cpu.combine(torch.zeros(1, 4), [torch.ones(3, 4)], source, index, torch.ones(1, 1))
