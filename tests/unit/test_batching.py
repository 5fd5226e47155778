"""What the next step computes, with answers worked out by hand."""

from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from services.attention.batching import Batcher, Limits, prefills, refusal
from services.attention.kv_cache import BlockPool
from services.attention.sequence import Sequence
from shared.request_messages import SamplingParams, Submit
from tests.unit.toy_engine import int32


def limits(**changes: Any):
    defaults: dict[str, Any] = {
        "max_model_len": 100, "max_num_seqs": 4, "max_batched_tokens": 10, "max_waiting": 9, "vocab_size": 50,
        "kv_blocks": 25, "block_size": 4,
    }  # fmt: skip
    return Limits(**{**defaults, **changes})


def batcher(**changes):
    made = limits(**changes)
    return Batcher(made, BlockPool(made.kv_blocks, made.block_size))


def submit(name, prompt, max_tokens=20, output=0, **sampling: Any):
    return Submit(
        request_id=name, gateway="g", prompt=int32([1] * prompt), output=int32([2] * output), deadline_s=9,
        sampling=SamplingParams(max_tokens=max_tokens, **sampling),
    )  # fmt: skip


def add(batch, name, prompt, max_tokens=20):
    batch.add(Sequence.from_submit(submit(name, prompt, max_tokens), batch.pool, now=0.0))


def rows(chunks):
    return [(c.sequence.request_id, c.start, c.count) for c in chunks]


def compute(chunks):
    """As the engine does after a forward pass; every complete sequence gets a token."""
    for chunk in chunks:
        complete = chunk.complete
        chunk.sequence.computed += chunk.count
        if complete:
            chunk.sequence.append(3)


def step(batch):
    chunks = batch.next_step()
    done = rows(chunks)
    compute(chunks)
    return done


def test_a_long_prompt_is_prefilled_in_chunks_that_share_steps_with_decodes():
    batch = batcher()
    add(batch, "short", 3)
    assert step(batch) == [("short", 0, 3)]
    add(batch, "long", 22)
    assert step(batch) == [("short", 3, 1), ("long", 0, 9)]
    assert step(batch) == [("short", 4, 1), ("long", 9, 9)]
    assert step(batch) == [("short", 5, 1), ("long", 18, 4)]
    assert step(batch) == [("short", 6, 1), ("long", 22, 1)]


def test_a_step_is_prefill_while_it_computes_more_than_one_row_of_some_sequence():
    batch = batcher()
    add(batch, "short", 3)
    add(batch, "one", 1)
    seen = []
    for _ in range(3):
        chunks = batch.next_step()
        seen.append(prefills(chunks))
        compute(chunks)
    assert seen == [True, False, False]
    assert not prefills([])


def test_a_prompt_takes_small_steps_while_most_requests_generate():
    batch = batcher(mixed_prefill=3)
    add(batch, "a", 2)
    add(batch, "b", 2)
    assert step(batch) == [("a", 0, 2), ("b", 0, 2)]
    add(batch, "long", 9)
    add(batch, "next", 1)
    assert step(batch) == [("a", 2, 1), ("b", 2, 1), ("long", 0, 8)], "as many wait as generate"
    batch.remove(batch.waiting[0])
    add(batch, "late", 7)
    step(batch)
    assert step(batch) == [("a", 4, 1), ("b", 4, 1), ("long", 9, 1), ("late", 3, 3)]


def test_nobody_younger_starts_before_a_prompt_is_complete():
    batch = batcher(max_batched_tokens=4)
    add(batch, "old", 6)
    add(batch, "young", 2)
    assert step(batch) == [("old", 0, 4)]
    assert step(batch) == [("old", 4, 2), ("young", 0, 2)]
    assert step(batch) == [("old", 6, 1), ("young", 2, 1)]


def test_requests_start_in_the_order_in_which_they_came():
    batch = batcher(max_num_seqs=2)
    for name in "abc":
        add(batch, name, 2)
    assert step(batch) == [("a", 0, 2), ("b", 0, 2)]
    batch.remove(batch.running[0])
    assert step(batch) == [("b", 2, 1), ("c", 0, 2)]


def test_a_big_request_at_the_head_is_not_overtaken_by_a_small_one():
    batch = batcher(kv_blocks=6)
    add(batch, "a", 8)
    assert step(batch) == [("a", 0, 8)]
    add(batch, "big", 16)
    add(batch, "small", 1)
    assert step(batch) == [("a", 8, 1)]
    batch.remove(batch.running[0])
    assert step(batch)[0] == ("big", 0, 10)


def test_asking_again_without_computing_gives_the_same_rows():
    batch = batcher(kv_blocks=5)
    add(batch, "a", 7)
    add(batch, "b", 5)
    first = rows(batch.next_step())
    assert rows(batch.next_step()) == first
    compute(batch.next_step())
    again = rows(batch.next_step())
    assert rows(batch.next_step()) == again


def test_the_youngest_gives_its_blocks_back_and_goes_to_the_front_of_the_queue():
    batch = batcher(kv_blocks=4)
    add(batch, "a", 4, max_tokens=12)
    add(batch, "b", 4, max_tokens=8)
    add(batch, "c", 1)
    assert step(batch) == [("a", 0, 4), ("b", 0, 4)]
    for _ in range(4):
        step(batch)
    assert batch.pool.free == 0
    assert step(batch) == [("a", 8, 1)]
    assert batch.preemptions == 1
    assert [s.request_id for s in batch.waiting] == ["b", "c"]
    preempted = batch.waiting[0]
    assert (preempted.computed, preempted.length, len(preempted.table.ids)) == (0, 9, 0)


def test_what_was_preempted_is_computed_again_with_its_output():
    batch = batcher(kv_blocks=4, max_batched_tokens=16)
    add(batch, "a", 4, max_tokens=12)
    add(batch, "b", 4, max_tokens=8)
    for _ in range(6):
        step(batch)
    batch.remove(batch.running[0])
    assert step(batch) == [("b", 0, 9)]


def test_a_newcomer_needs_a_block_to_spare_for_everyone_who_runs():
    batch = batcher(kv_blocks=4)
    add(batch, "a", 5)
    add(batch, "b", 5)
    assert step(batch) == [("a", 0, 5)], "two blocks are free, but the next of a's would have to come from b"


def test_removing_frees_the_blocks_in_every_state():
    batch = batcher(max_num_seqs=2)
    for name in "abc":
        add(batch, name, 6)
    step(batch)
    for sequence in list(batch):
        batch.remove(sequence)
        batch.remove(sequence)
    assert (batch.pool.leaked(), list(batch)) == ([], [])


def test_what_can_never_fit_is_refused_with_the_reason():
    def code(request, **changes) -> Any:
        decision = refusal(request, limits(**changes))
        return decision and (decision.code, decision.message)

    assert code(submit("a", 90, 10)) is None
    assert code(submit("a", 91, 10)) == (
        "too_long", "91 prompt tokens and max_tokens 10: more than the context of 100 tokens",
    )  # fmt: skip
    assert code(submit("a", 30, 11), kv_blocks=10) is None, "the last token needs no slot"
    assert code(submit("a", 30, 12), kv_blocks=10) == (
        "too_long", "30 prompt tokens and max_tokens 12: more than the KV cache of 40 tokens",
    )  # fmt: skip
    assert code(submit("a", 0))[0] == "invalid"
    assert code(submit("a", 3, logit_bias={50: 1.0}))[0] == "invalid"
    assert code(submit("a", 3).model_copy(update={"prompt": b"12345"}))[0] == "invalid"
    for token in (-1, 50):
        assert code(submit("a", 3).model_copy(update={"output": int32([token])}))[0] == "invalid"


@settings(max_examples=200, deadline=None)
@given(
    requests=st.lists(st.tuples(st.integers(1, 30), st.integers(1, 20)), min_size=1, max_size=12),
    seqs=st.integers(1, 5),
    more_rows=st.integers(0, 12),
    blocks=st.integers(13, 30),
)
def test_everybody_ends_whatever_the_limits(requests, seqs, more_rows, blocks):
    batch = batcher(max_num_seqs=seqs, max_batched_tokens=seqs + more_rows, kv_blocks=blocks)
    for number, (prompt, max_tokens) in enumerate(requests):
        assert refusal(submit("x", prompt, max_tokens), batch.limits) is None
        add(batch, str(number), prompt, max_tokens)
    for _ in range(5000):
        chunks = batch.next_step()
        if not chunks:
            break
        assert sum(c.count for c in chunks) <= batch.limits.max_batched_tokens
        assert len(batch.running) <= seqs
        assert all(c.start + c.count <= len(c.sequence.table.ids) * 4 for c in chunks), "a row without a slot"
        ages = [int(s.request_id) for s in batch]
        assert ages == sorted(ages), "somebody was overtaken"
        compute(chunks)
        for chunk in chunks:
            if chunk.sequence.ended(100):
                batch.remove(chunk.sequence)
    assert (list(batch), batch.pool.leaked()) == ([], [])
