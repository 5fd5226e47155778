"""The exactness contract of the CPU kernels: a row's bits depend on the row alone.

Not on how many rows are in the call, where it stands among them, how rows are split over calls, the number of threads,
or how the KV cache is laid out.
"""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from shared.kernels.cpu import CpuKernels
from shared.models.spec import RouterSpec
from tests.unit.kernel_cases import MATRIX_DTYPES, expert_case, fp8, matrix, normal, paged_case

few = settings(max_examples=25, deadline=None)
seeds = st.integers(0, 1000)
dtypes = pytest.mark.parametrize("dtype", MATRIX_DTYPES)


@pytest.fixture(scope="module", params=[(True, True), (True, False), (False, True)], ids=["tiles", "rounded", "plain"])
def ways(request: pytest.FixtureRequest) -> tuple[bool, bool]:
    """How bf16 weights are multiplied: on AMX tiles, where this CPU has them, or not; rows rounded for it, or not."""
    return request.param


@pytest.fixture(scope="module")
def one(ways: tuple[bool, bool]) -> CpuKernels:
    return CpuKernels(1, *ways)


@pytest.fixture(scope="module")
def two(ways: tuple[bool, bool]) -> CpuKernels:
    return CpuKernels(2, *ways)


@dtypes
@pytest.mark.parametrize("depth", [1024, 100, 7])
def test_linear_rows_are_the_same_alone_and_in_any_number(
    one: CpuKernels, two: CpuKernels, dtype: torch.dtype, depth: int
) -> None:
    x, weight = normal(70, depth, seed=0), matrix(301, depth, 1, dtype)
    bias = normal(301, seed=2)
    alone = torch.cat([one.linear(x[t : t + 1], weight, bias) for t in range(len(x))])
    for rows in (1, 2, 5, 6, 10, 11, 16, 17, 32, 33, 48, 49, 64, 70):
        for kernels in (one, two):
            assert torch.equal(kernels.linear(x[:rows], weight, bias), alone[:rows])
            assert torch.equal(kernels.linear(x[-rows:], weight, bias), alone[-rows:])


@few
@given(rows=st.integers(1, 40), depth=st.integers(1, 90), cols=st.integers(1, 90), data=st.data(), seed=seeds)
def test_linear_rows_are_the_same_in_any_order_and_any_split(
    one: CpuKernels, rows: int, depth: int, cols: int, data: st.DataObject, seed: int
) -> None:
    x, weight = normal(rows, depth, seed=seed), normal(cols, depth, seed=seed + 1, dtype=torch.bfloat16)
    whole = one.linear(x, weight)
    order = torch.tensor(data.draw(st.permutations(range(rows))))
    cut = data.draw(st.integers(0, rows))
    parts = [one.linear(x[order][a:b], weight) for a, b in ((0, cut), (cut, rows))]
    assert torch.equal(torch.cat(parts), whole[order])


@few
@given(
    rows=st.integers(1, 40),
    depth=st.integers(1, 300),
    cols=st.integers(1, 200),
    block=st.sampled_from(((128, 128), (128, 64), (1, 16), (3, 5), (200, 1000))),
    seed=seeds,
)
def test_fp8_blocks_give_the_bits_of_fp32_weights_in_any_number_of_rows(
    one: CpuKernels, two: CpuKernels, rows: int, depth: int, cols: int, block: tuple[int, int], seed: int
) -> None:
    x, weight = normal(rows, depth, seed=seed), fp8(cols, depth, block, seed=seed + 1)
    whole = two.linear(x, weight.unpacked())
    assert torch.equal(two.linear(x, weight), whole)
    assert torch.equal(one.linear(x[-1:], weight), whole[-1:])


@few
@given(
    rows=st.integers(1, 30),
    depth=st.integers(1, 90),
    score=st.sampled_from(("softmax", "sigmoid", "top_softmax", "top_sigmoid", "sparsemixer")),
    groups=st.sampled_from((1, 3)),
    seed=seeds,
)
def test_norm_and_gate_rows_are_the_same_alone(
    one: CpuKernels, rows: int, depth: int, score: str, groups: int, seed: int
) -> None:
    x, gain, gate = normal(rows, depth, seed=seed), normal(depth, seed=1), normal(9, depth, seed=2)
    router = RouterSpec(9, 4, score, jitter=0.1, groups=1 if score == "sparsemixer" else groups, top_groups=2)
    normed, centred = one.rms_norm(x, gain, 1e-6), one.layer_norm(x, gain, gain, 1e-6)
    weights, ids = one.route(x, gate, router)
    for t in range(rows):
        row = x[t : t + 1]
        assert torch.equal(one.rms_norm(row, gain, 1e-6), normed[t : t + 1])
        assert torch.equal(one.layer_norm(row, gain, gain, 1e-6), centred[t : t + 1])
        alone = one.route(row, gate, router)
        assert torch.equal(alone[0], weights[t : t + 1]) and torch.equal(alone[1], ids[t : t + 1])


@few
@given(
    lengths=st.lists(st.integers(1, 90), min_size=1, max_size=4),
    group=st.integers(1, 6),
    depth=st.sampled_from((2, 18, 32, 40, 64)),
    window=st.sampled_from((0, 1, 20)),
    chunk=st.sampled_from((0, 17)),
    sinks=st.booleans(),
    data=st.data(),
    seed=seeds,
)
def test_attention_rows_are_the_same_in_any_chunks_batches_threads_and_layouts(
    one: CpuKernels,
    two: CpuKernels,
    lengths: list[int],
    group: int,
    depth: int,
    window: int,
    chunk: int,
    sinks: bool,
    data: st.DataObject,
    seed: int,
) -> None:
    case = paged_case(lengths, 2 * group, 2, depth, block_size=16, window=window, seed=seed, chunk=chunk, sinks=sinks)
    whole = case.run(one)
    assert torch.equal(case.run(two), whole)
    block_size = data.draw(st.sampled_from((1, 3, 8, 64)))
    assert torch.equal(case.laid_out(block_size, seed + 1).run(one), whole)
    rows = len(case.positions)
    cut = data.draw(st.integers(1, rows))
    chunks = [case.rows(part).run(two) for part in (list(range(cut)), list(range(cut, rows))) if part]
    assert torch.equal(torch.cat(chunks), whole)
    some = data.draw(st.lists(st.integers(0, rows - 1), min_size=1, max_size=12))
    assert torch.equal(case.rows(some).run(two), whole[some])


def test_attention_of_a_long_prompt_is_the_same_token_by_token(one: CpuKernels, two: CpuKernels) -> None:
    case = paged_case([700], heads=4, kv_heads=1, depth=64)
    whole = case.run(two)
    for t in (0, 15, 16, 63, 64, 65, 300, 699):
        assert torch.equal(case.rows([t]).run(one)[0], whole[t])


def test_attention_with_values_inside_keys_is_the_same_in_any_chunks(one: CpuKernels, two: CpuKernels) -> None:
    case = paged_case([90, 33], heads=6, kv_heads=1, depth=40)
    case = replace(case, caches=(case.caches[0], case.caches[0][..., :32]))
    whole = case.run(two)
    for chosen in ([0], [5, 6, 100], list(range(40, 123))):
        assert torch.equal(case.rows(chosen).run(one), whole[chosen])


def test_products_per_head_are_the_same_alone_and_in_any_number(one: CpuKernels, two: CpuKernels) -> None:
    x, weight = normal(40, 3, 70, seed=0), normal(3, 90, 70, seed=1, dtype=torch.bfloat16)
    alone = torch.cat([one.head_linear(x[t : t + 1], weight, torch.empty(1, 3, 90)) for t in range(len(x))])
    for rows in (1, 2, 15, 16, 17, 40):
        assert torch.equal(two.head_linear(x[:rows], weight, torch.empty(rows, 3, 90)), alone[:rows])


def test_attention_does_not_see_what_follows_a_row(one: CpuKernels) -> None:
    case = paged_case([40])
    whole = case.run(one)
    for cache in case.caches:
        cache[case.tables[0, 1:].long()] = float("nan")
    assert torch.equal(case.run(one)[:16], whole[:16])


@dtypes
@pytest.mark.parametrize("biased", [False, True])
def test_expert_parts_are_the_same_alone_and_in_any_batch(
    one: CpuKernels, two: CpuKernels, dtype: torch.dtype, biased: bool
) -> None:
    case = expert_case(60, hidden=70, inner=37, dtype=dtype, biased=biased)
    whole = case.run(one)
    assert torch.equal(case.run(two), whole)
    for chosen in ([0], [17], [3, 50, 51, 52, 120], list(range(40, 90)), list(range(1, 180, 2))):
        assert torch.equal(case.parts(chosen).run(two), whole[chosen])


def test_large_experts_are_the_same_with_one_and_two_threads(one: CpuKernels, two: CpuKernels) -> None:
    case = expert_case(33, hidden=512, inner=256, experts=4, top_k=2)
    assert torch.equal(case.run(one), case.run(two))


def test_combine_rows_are_the_same_wherever_their_parts_came_from(one: CpuKernels) -> None:
    parts, weights = normal(12, 50, seed=0), normal(3, 4, seed=1)
    index = torch.arange(12, dtype=torch.int32).view(3, 4)
    together, split = torch.zeros(3, 50), torch.zeros(3, 50)
    one.combine(together, [parts], torch.zeros_like(index), index, weights)
    one.combine(split, [parts[::2].contiguous(), parts[1::2].contiguous()], index % 2, index // 2, weights)
    assert torch.equal(together, split)
