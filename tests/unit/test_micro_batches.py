"""How a step is cut into micro-batches, and when it is."""

from hypothesis import given
from hypothesis import strategies as st

from services.attention.batching import Chunk
from services.attention.kv_cache import BlockPool
from services.attention.micro_batches import PAIRS, TRIAL_EVERY, UNDISTURBED, MicroBatching, split
from services.attention.sequence import Sequence
from tests.unit.test_batching import submit

TRIAL = 2 * (PAIRS + 1)


def step_of(counts):
    pool = BlockPool(100, 4)
    return [Chunk(Sequence.from_submit(submit(f"s{i}", 90), pool, 0.0), 3, n) for i, n in enumerate(counts)]


@given(st.lists(st.integers(1, 20), min_size=1, max_size=8), st.integers(1, 3))
def test_a_cut_step_has_the_same_rows_in_the_same_order_in_even_parts(counts, parts):
    chunks = step_of(counts)
    cut = split(chunks, parts)
    rows = [(c.sequence.request_id, c.start + i) for part in cut for c in part for i in range(c.count)]
    assert rows == [(c.sequence.request_id, c.start + i) for c in chunks for i in range(c.count)]
    sizes = [sum(c.count for c in part) for part in cut]
    assert len(cut) == min(parts, sum(counts))
    assert max(sizes) - min(sizes) <= 1


def test_only_the_last_piece_of_a_chunk_makes_its_sequence_complete_and_only_the_first_is_its_first():
    (chunk,) = step_of([1])
    whole = Chunk(chunk.sequence, 0, 90)
    first, second = (part[0] for part in split([whole], 2))
    assert (first.first, first.complete) == (True, False)
    assert (second.first, second.complete) == (False, True)


def run(policy, steps, seconds, rows=8):
    """Micro-batches of the next steps when those of n micro-batches take ``seconds(n)``."""
    counts = []
    for step in range(steps):
        counts.append(policy.count(rows))
        policy.observe(rows, counts[-1], seconds(counts[-1], step))
    return counts


def test_steps_are_split_once_a_trial_has_shown_that_it_pays():
    counts = run(MicroBatching(), UNDISTURBED + TRIAL + 50, lambda n, _: 1.0 / n)
    assert counts[:UNDISTURBED] == [1] * UNDISTURBED
    assert counts[UNDISTURBED : UNDISTURBED + TRIAL] == [1, 2] * (PAIRS + 1)
    assert counts[UNDISTURBED + TRIAL :] == [2] * 50


def test_steps_stay_whole_where_splitting_is_not_clearly_faster_and_are_tried_again_seldom():
    counts = run(MicroBatching(), 4 * TRIAL_EVERY, lambda n, _: 1.0 - 0.04 * (n - 1))
    assert set(counts) == {1, 2}
    assert counts.count(2) <= 4 * (PAIRS + 1)


def test_a_host_that_slows_down_in_the_middle_of_a_trial_decides_nothing():
    slow = UNDISTURBED + TRIAL // 2
    counts = run(MicroBatching(), 100, lambda n, step: (1.0 if n == 1 else 1.3) * (5 if step < slow else 1))
    assert counts[UNDISTURBED + TRIAL :] == [1] * (100 - UNDISTURBED - TRIAL)


def test_sizes_are_judged_apart():
    policy = MicroBatching()
    run(policy, UNDISTURBED + TRIAL, lambda n, _: 1.0 / n, rows=64)
    run(policy, UNDISTURBED + TRIAL, lambda n, _: 1.0 * n, rows=8)
    assert (policy.count(64), policy.count(8)) == (2, 1)


def test_a_fixed_number_is_kept_whatever_is_measured_and_one_row_is_never_split():
    assert run(MicroBatching(2), 30, lambda n, _: 1.0 * n) == [2] * 30
    assert run(MicroBatching(1), 30, lambda n, _: 1.0 / n) == [1] * 30
    assert run(MicroBatching(2), 3, lambda n, _: 1.0, rows=1) == [1] * 3
