"""Batches of a replay: the engine's own, step by step; and one batch a second, by hand."""

from collections import deque
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from services.attention.batching import Batcher, Limits
from services.attention.kv_cache import BlockPool
from services.attention.sequence import Sequence
from shared.replay.arrivals import Arrivals
from shared.replay.batches import EngineBatches, SecondBatches
from shared.request_messages import SamplingParams, Submit
from tests.unit.replay_cases import arrivals, inputs
from tests.unit.toy_engine import int32


def engine(given: Any) -> Batcher:
    """The engine's batcher with a KV cache that holds everybody."""
    limits = Limits(
        max_model_len=4096, max_num_seqs=given.max_num_seqs, max_batched_tokens=given.max_batched_tokens,
        max_waiting=99, vocab_size=9, kv_blocks=9999, block_size=16, mixed_prefill=given.mixed_prefill,
    )  # fmt: skip
    return Batcher(limits, BlockPool(9999, 16))


def sequence(batcher: Batcher, number: int, prompt: int, tokens: int) -> Sequence:
    request = Submit(
        request_id=str(number), gateway="g", prompt=int32([1] * prompt), output=b"", deadline_s=9,
        sampling=SamplingParams(max_tokens=tokens),
    )  # fmt: skip
    return Sequence.from_submit(request, batcher.pool, now=0.0)


def engine_step(batcher: Batcher) -> list[tuple[int, int, int]]:
    chunks = batcher.next_step()
    done = [(int(chunk.sequence.request_id), chunk.start, chunk.count) for chunk in chunks]
    for chunk in chunks:
        complete = chunk.complete
        chunk.sequence.computed += chunk.count
        if complete:
            chunk.sequence.append(3)
            if chunk.sequence.ended(4096):
                batcher.remove(chunk.sequence)
    return done


@pytest.mark.parametrize("limits", [(64, 512, 80), (4, 64, 8), (3, 100, 100), (16, 16, 1)])
@pytest.mark.parametrize("seed", range(3))
def test_batches_are_those_that_the_engine_forms(limits: tuple[int, int, int], seed: int) -> None:
    given = inputs(max_num_seqs=limits[0], max_batched_tokens=limits[1], mixed_prefill=limits[2])
    requests = arrivals(40, seed, gap=0.05)
    ours, batcher, now, steps = EngineBatches(requests, given), engine(given), 0.0, 0
    coming = deque(range(40))
    while True:
        while coming and requests.times[coming[0]] <= now:
            number = coming.popleft()
            batcher.add(sequence(batcher, number, int(requests.context[number]), int(requests.generated[number])))
        step = ours.next_step(now)
        assert list(zip(*(column.tolist() for column in step), strict=True)) == engine_step(batcher)
        if not len(step.requests) and not np.isfinite(ours.next_time(now)):
            break
        now, steps = max(now + 0.01, ours.next_time(now) if not len(step.requests) else 0), steps + 1
    assert steps > 40
    assert not batcher.running
    assert not batcher.waiting


def test_every_token_but_the_last_is_computed_once() -> None:
    given, requests = inputs(max_batched_tokens=64, mixed_prefill=8), arrivals(20)
    batches, now, seen = EngineBatches(requests, given), 0.0, np.zeros(20, np.int64)
    while np.isfinite(now):
        step = batches.next_step(now)
        assert (step.starts == seen[step.requests]).all()
        seen[step.requests] += step.counts
        now = now + 0.01 if len(step.requests) else batches.next_time(now)
    assert (seen == requests.context + requests.generated - 1).all()


def test_all_requests_of_a_second_are_one_batch_that_ends_before_the_next_begins() -> None:
    requests = Arrivals(np.array([0.0, 0.9, 1.5]), np.array([5, 7, 4]), np.array([1, 3, 1]))
    batches = SecondBatches(requests)
    assert not len(batches.next_step(0.95).requests), "the second is not over"
    assert batches.next_time(0.95) == 1.0
    steps = [batches.next_step(2.0) for _ in range(4)]
    rows = [[column.tolist() for column in step] for step in steps]
    assert rows[0] == [[0, 1], [0, 0], [5, 7]]
    assert rows[1] == [[1], [7], [1]], "request 0 had its only token from its prompt"
    assert rows[2] == [[1], [8], [1]]
    assert rows[3] == [[2], [0], [4]]
    assert not len(batches.next_step(3.0).requests)
    assert batches.next_time(3.0) == np.inf


def test_limits_are_those_of_the_profile() -> None:
    step = EngineBatches(arrivals(20, gap=0.0), replace(inputs(), max_batched_tokens=100, max_num_seqs=3)).next_step(
        0.0
    )
    assert step.counts.sum() <= 100
    assert len(step.requests) <= 3
