"""Token choice against a plain second implementation, and its independence of everything it must not depend on."""

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from services.attention.kv_cache import BlockPool
from services.attention.sampler import choose, token_logprobs
from services.attention.sampling_kernels import uniform
from services.attention.sequence import Sequence
from shared.request_messages import SamplingParams, Submit
from tests.unit.toy_engine import int32

VOCAB = 40
MASK = (1 << 64) - 1


def sequence(prompt=(1,), output=(), **sampling: Any):
    request = Submit(
        request_id="r", gateway="g", prompt=int32(prompt), output=int32(output), deadline_s=9,
        sampling=SamplingParams(**{"max_tokens": 50, "temperature": 0, **sampling}),
    )  # fmt: skip
    return Sequence.from_submit(request, BlockPool(100, 4), 0.0)


def one(logits, **given) -> Any:
    row = np.array(logits, dtype=np.float32)[None, :]
    return choose(row, [sequence(**given)])[0]


def rows(count, seed=0, scale=3.0):
    return (np.random.default_rng(seed).standard_normal((count, VOCAB)) * scale).astype(np.float32)


# ---- a second implementation: everything sorted, nothing clever ---------------------------------------------


def mix(state):
    z = (state + 0x9E3779B97F4A7C15) & MASK
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & MASK
    return z ^ (z >> 31)


def expected(logits, position, seed, temperature, top_k=0, top_p=1.0, min_p=0.0):
    weights = [math.exp((float(value) - float(max(logits))) / temperature) for value in logits]
    kept = [token for token, weight in enumerate(weights) if weight >= min_p]
    if top_k or top_p < 1:
        kept = sorted(kept, key=lambda token: (-weights[token], token))[: top_k or None]
        total, nucleus = sum(weights[token] for token in kept), []
        for token in kept:
            if nucleus and sum(weights[t] for t in nucleus) >= top_p * total:
                break
            nucleus.append(token)
        kept = nucleus
    target = (mix(mix(seed) ^ position) >> 11) / (1 << 53) * sum(weights[token] for token in kept)
    running = 0.0
    for token in kept:
        running += weights[token]
        if running > target:
            return token
    return kept[-1]


@settings(max_examples=150, deadline=None)
@given(
    row=st.integers(0, 1000),
    scale=st.sampled_from([0.0, 0.5, 3.0, 30.0]),
    position=st.integers(0, 30),
    params=st.fixed_dictionaries(
        {"seed": st.integers(0, MASK), "temperature": st.floats(0.05, 2.0)},
        optional={"top_k": st.integers(1, 50), "top_p": st.floats(0.01, 1.0), "min_p": st.floats(0.0, 1.0)},
    ),
)
def test_sampling_agrees_with_a_plain_implementation(row, scale, position, params):
    logits = rows(1, row, scale)[0]
    choice = one(logits, output=[5] * position, **params)
    assert choice.token == expected(logits, position, **params)


def test_the_draws_follow_the_distribution():
    logits = np.log(np.array([0.5, 0.25, 0.125, 0.125]))
    sequences = [sequence(temperature=1.0, seed=seed) for seed in range(4000)]
    choices = choose(np.tile(logits, (4000, 1)).astype(np.float32), sequences)
    tokens = np.array([choice.token for choice in choices])
    shares = np.bincount(tokens, minlength=4) / 4000
    assert np.abs(shares - [0.5, 0.25, 0.125, 0.125]).max() < 0.03


def test_uniforms_are_in_range_and_differ_between_seeds_and_positions():
    seen = [uniform(np.uint64(seed), np.uint64(position)) for seed in (0, 1, MASK) for position in range(50)]
    assert all(0 <= value < 1 for value in seen)
    assert len(set(seen)) == len(seen)


# ---- independence -------------------------------------------------------------------------------------------

MIX: list[dict[str, Any]] = [
    {"temperature": 0},
    {"temperature": 0, "logprobs": 3},
    {"temperature": 0.7, "seed": 1},
    {"temperature": 1.0, "seed": 2, "top_k": 5, "logprobs": 20},
    {"temperature": 1.3, "seed": 3, "top_p": 0.8, "presence_penalty": 0.5, "output": [3, 4, 3]},
    {"temperature": 1.0, "seed": 4, "min_p": 0.1, "frequency_penalty": -1.0, "output": [7]},
    {"temperature": 0, "repetition_penalty": 1.5, "prompt": [9, 9, 2]},
    {"temperature": 2.0, "seed": 5, "logit_bias": {3: 4.5}, "logprobs": 0},
]


def test_a_row_gets_the_same_token_and_logprob_bits_alone_and_in_any_batch():
    logits = rows(len(MIX), scale=2.0)
    alone = [choose(logits[r : r + 1], [sequence(**MIX[r])])[0] for r in range(len(MIX))]
    order = np.random.default_rng(1).permutation(np.repeat(np.arange(len(MIX)), 5))
    together = choose(logits[order], [sequence(**MIX[r]) for r in order])
    assert together == [alone[r] for r in order]


def test_choosing_leaves_the_logits_alone():
    logits = rows(len(MIX))
    before = logits.copy()
    choose(logits, [sequence(**given) for given in MIX])
    assert np.array_equal(logits, before)


# ---- greedy -------------------------------------------------------------------------------------------------


def test_greedy_takes_the_first_of_equals():
    assert one([0, 2, 5, 5, 1]).token == 2


def test_a_tiny_temperature_is_greedy():
    assert one([0.0, 1e-6, 0.0], temperature=9e-6).token == 1


# ---- what changes the logits --------------------------------------------------------------------------------


def test_repetition_penalty_covers_prompt_and_output_and_pushes_negative_logits_down():
    assert one([4.0, 3.0], prompt=[0], repetition_penalty=2.0).token == 1
    assert one([4.0, 3.0], prompt=[1], output=[0], repetition_penalty=1.4).token == 0, "both are penalised"
    assert one([-1.0, -1.5], prompt=[0], repetition_penalty=2.0).token == 1


def test_presence_and_frequency_penalties_cover_the_output_only():
    assert one([2.0, 1.0], prompt=[0, 0, 0], presence_penalty=2.0, frequency_penalty=2.0).token == 0
    assert one([2.0, 1.0], output=[0], presence_penalty=1.5).token == 1
    assert one([2.0, 1.0], output=[0], frequency_penalty=0.6).token == 0
    assert one([2.0, 1.0], output=[0, 0], frequency_penalty=0.6).token == 1


def test_logit_bias_moves_the_choice_but_not_the_logprobs():
    logits = [1.0, 2.0, 0.0]
    choice = one(logits, logit_bias={2: 50.0}, logprobs=1)
    assert choice.token == 2
    assert choice.logprobs.logprob == pytest.approx(0.0 - math.log(sum(map(math.exp, logits))), abs=1e-12)
    assert choice.logprobs.rank == 3
    assert choice.logprobs.top[0][0] == 1


def test_min_tokens_holds_stop_tokens_back():
    stop = {"stop_token_ids": (1, 99), "min_tokens": 2}
    assert one([0.0, 9.0, 1.0], output=[0], **stop).token == 2
    assert one([0.0, 9.0, 1.0], output=[0, 0], **stop).token == 1


# ---- logprobs -----------------------------------------------------------------------------------------------


def test_logprobs_are_the_log_softmax_with_ties_to_the_lowest_id():
    logits = np.array([[1.0, 3.0, 3.0, -np.inf, 0.5]], dtype=np.float32)
    wide = logits[0].astype(np.float64)
    softmax = wide - np.log(np.exp(wide).sum())
    found: Any = token_logprobs(logits, np.array([2]), [5])[0]
    assert [token for token, _ in found.top] == [1, 2, 0, 4, 3]
    assert [value for _, value in found.top] == pytest.approx(list(softmax[[1, 2, 0, 4, 3]]), abs=1e-12)
    assert (found.logprob, found.rank) == (found.top[1][1], 2)


@given(st.lists(st.integers(-3, 3), min_size=3, max_size=12), st.integers(0, 2), st.integers(0, 20))
@settings(max_examples=60, deadline=None)
def test_alternatives_are_the_head_of_the_sorted_row(values, token, count):
    logits = np.array([values], dtype=np.float32)
    order = sorted(range(len(values)), key=lambda i: (-values[i], i))
    found: Any = token_logprobs(logits, np.array([token]), [min(count, len(values))])[0]
    assert [i for i, _ in found.top] == order[: min(count, len(values))]
    assert order[found.rank - 1] == token


def test_more_alternatives_than_the_vocabulary_has_are_left_out():
    found: Any = token_logprobs(np.zeros((1, 3), np.float32), np.array([0]), [5])[0]
    assert [token for token, _ in found.top] == [0, 1, 2]


# ---- rows that are no numbers -------------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [0, 1.0])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_broken_row_has_no_token_and_hurts_nobody_else(temperature, bad):
    logits = rows(3)
    logits[1, 7] = bad
    given = {"temperature": temperature, "logprobs": 2}
    choices = choose(logits, [sequence(**given)] * 3)
    assert [choice.token is None for choice in choices] == [False, True, False]
    assert choices[0] == choose(logits[:1], [sequence(**given)])[0]


@pytest.mark.parametrize("temperature", [0, 1.0])
def test_a_row_with_nothing_left_to_choose_has_no_token(temperature):
    assert one([-math.inf] * 4, temperature=temperature).token is None
