"""The single calls of both sides of an exchange do what their steps do, and refuse what those refuse."""

import gc
import weakref
from functools import partial

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from services.attention.replies import Arrangement
from shared.activation import PARTS, PROBLEMS, Choice, NoLiveHome, plan_exchange
from shared.kernels.cpu import CpuKernels
from shared.models.spec import RouterSpec
from shared.scheduling.policies import Policy
from tests.unit.kernel_cases import MATRIX_DTYPES, matrix, normal

EXPERTS, TOP_K, HIDDEN, INNER = 7, 3, 24, 40
ROUTER = RouterSpec(experts=EXPERTS, top_k=TOP_K)
few = settings(max_examples=25, deadline=None)


@pytest.fixture(scope="module", params=[True, False], ids=["tiles", "plain"])
def cpu(request: pytest.FixtureRequest) -> CpuKernels:
    return CpuKernels(1, request.param)


def table(cpu: CpuKernels, dtype: torch.dtype, resident: range = range(EXPERTS)):
    shapes = (INNER, HIDDEN), (INNER, HIDDEN), (HIDDEN, INNER)
    return cpu.expert_table({e: [matrix(*shape, 7 * e + i, dtype) for i, shape in enumerate(shapes)] for e in resident})


@few
@given(
    rows=st.integers(1, 20),
    seed=st.integers(0, 1000),
    live=st.integers(1, 7),
    instance=st.integers(0, 2),
    dtype=st.sampled_from(MATRIX_DTYPES),
    policy=st.sampled_from(Policy),
)
def test_an_answer_is_gate_choice_and_experts_one_after_the_other(cpu, rows, seed, live, instance, dtype, policy):
    x, router = normal(rows, HIDDEN, seed=seed), normal(EXPERTS, HIDDEN, seed=seed + 1)
    homes = np.random.default_rng(seed).integers(1, 8, EXPERTS).astype(np.uint64)
    weights, ids = cpu.route(x, router, ROUTER)
    choice = Choice(homes, live, instance, policy)
    experts, room, counts = table(cpu, dtype), torch.empty(rows, HIDDEN), np.zeros((2, EXPERTS), np.int64)
    answering = cpu.answering(partial(cpu.route, room, router, ROUTER), room, experts, "silu")
    meta, out = np.full(12 * rows * TOP_K, 255, np.uint8), torch.empty(rows * TOP_K, HIDDEN)
    try:
        parts, digest = plan_exchange(ids.numpy(), weights.numpy(), choice)
    except NoLiveHome as error:
        with pytest.raises(NoLiveHome, match=str(error)):
            answering(x, choice, meta, out, counts)
        return
    expected = torch.empty(len(parts.tokens), HIDDEN)
    cpu.experts(x, experts, torch.from_numpy(parts.tokens), torch.from_numpy(parts.experts), "silu", expected)
    for _ in range(2):  # what is recorded can be used again
        count, same = answering(x, choice, meta, out, counts)
        assert (count, same) == (len(parts.tokens), digest)
        found = meta.view(PARTS)
        assert found[:count].tolist() == list(zip(*(array.tolist() for array in parts), strict=True))
        assert not meta[count * PARTS.itemsize :].any()
        assert torch.equal(out[:count], expected)
    parts_of = np.bincount(parts.experts, minlength=EXPERTS)
    assert counts.tolist() == [(2 * parts_of).tolist(), (2 * (parts_of > 0)).tolist()]


def test_an_answer_keeps_the_weights_it_reads_whatever_happens_to_the_table(cpu):
    room, router, experts = torch.empty(2, HIDDEN), normal(EXPERTS, HIDDEN, seed=2), table(cpu, torch.bfloat16)
    answering = cpu.answering(partial(cpu.route, room, router, ROUTER), room, experts, "silu")
    alive = weakref.ref(experts)
    del experts
    gc.collect()
    assert alive() is not None
    del answering
    gc.collect()
    assert alive() is None


def test_an_answer_that_needs_an_expert_that_is_not_resident_is_an_error(cpu):
    x, router = normal(9, HIDDEN, seed=1), normal(EXPERTS, HIDDEN, seed=2)
    room = torch.empty(9, HIDDEN)
    answering = cpu.answering(
        partial(cpu.route, room, router, ROUTER), room, table(cpu, torch.float32, range(1)), "silu"
    )
    meta, out, counts = np.zeros(12 * 27, np.uint8), torch.empty(27, HIDDEN), np.zeros((2, EXPERTS), np.int64)
    with pytest.raises(ValueError, match="not resident"):
        answering(x, Choice(np.ones(EXPERTS, np.uint64), 1, 0), meta, out, counts)
    assert not counts.any()


def replies(seed: int, rows: int, senders: int) -> list[tuple[int, np.ndarray, torch.Tensor]]:
    """The parts of an exchange, dealt out to senders at random: bit, PARTS and rows of each."""
    rng = np.random.default_rng(seed)
    parts = np.zeros(rows * TOP_K, PARTS)
    parts["token"] = np.repeat(np.arange(rows), TOP_K)
    parts["expert"] = np.concatenate([rng.permutation(EXPERTS)[:TOP_K] for _ in range(rows)])
    parts["weight"] = rng.random(len(parts))
    sender = rng.integers(0, senders, len(parts))
    mine = [np.sort(parts[sender == i], order=["expert", "token"]) for i in range(senders)]
    return [(i, p, normal(len(p), HIDDEN, seed=seed + i)) for i, p in enumerate(mine)]


@few
@given(
    seed=st.integers(0, 1000),
    rows=st.integers(1, 9),
    senders=st.integers(1, 4),
    damage=st.sampled_from(["", "token", "expert", "twice", "lost", "home"]),
)
def test_what_comes_back_is_checked_and_added_as_step_by_step(cpu, seed, rows, senders, damage):
    given_replies, homes = replies(seed, rows, senders), np.full(EXPERTS, (1 << senders) - 1, np.uint64)
    parts = next(parts for _, parts, _ in given_replies if len(parts))
    if damage in ("token", "expert"):
        parts[damage][0] = max(rows, EXPERTS)
    elif damage == "twice":
        parts[-1] = parts[0]
    elif damage == "home":
        homes[parts["expert"][0]] = 1 << 40
    elif damage == "lost":
        given_replies = [(bit, p[:-1], rows) if p is parts else (bit, p, rows) for bit, p, rows in given_replies]
    x = normal(rows, HIDDEN, seed=seed)
    ours, theirs, arrangement = x.clone(), x.clone(), Arrangement(TOP_K)
    metas = [np.ascontiguousarray(p) for _, p, _ in given_replies]
    numbers = [
        (bit, meta.ctypes.data, r.data_ptr(), len(meta)) for (bit, _, r), meta in zip(given_replies, metas, strict=True)
    ]
    chosen = np.zeros((rows, TOP_K), np.uint32)
    code = cpu.gather(ours, np.array(numbers, np.int64), homes, chosen)
    problem = arrangement.fill(rows, [(i, m.view(np.uint8)) for i, m in enumerate(metas)], homes)
    if not problem:
        cpu.combine(theirs, [r for *_, r in given_replies], *arrangement.tensors(x.device))
        assert np.array_equal(chosen, arrangement.experts(rows))
        assert (np.diff(chosen.astype(int), axis=1) > 0).all()
    assert PROBLEMS[code] == problem
    assert bool(problem) or damage in ("", "twice")
    assert torch.equal(ours, theirs)
