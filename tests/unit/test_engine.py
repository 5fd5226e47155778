"""Output of the real engine around a toy model whose every token depends on the whole cache before it."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shared.request_messages import Ack
from tests.unit.toy_engine import ToyEngine, alone

PROMPT = [3, 1, 4, 1, 5, 9, 2, 6, 5]
SAMPLED = {"temperature": 1.0, "seed": 11, "logprobs": 2, "max_tokens": 12}


def outputs(engine):
    return {name: (r.tokens, r.logprobs, r.finish) for name, r in engine.received.items()}


def assert_idle(engine):
    stats = engine.engine.stats
    assert engine.pool.leaked() == []
    assert (stats.waiting, stats.running, stats.outstanding_tokens, stats.kv_blocks_used) == (0, 0, 0, 0)


# ---- exactness ----------------------------------------------------------------------------------------------

REQUESTS = st.lists(
    st.fixed_dictionaries(
        {
            "prompt": st.lists(st.integers(0, 49), min_size=1, max_size=25),
            "max_tokens": st.integers(1, 15),
            "temperature": st.sampled_from([0, 1.0]),
            "seed": st.integers(0, 99),
            "repetition_penalty": st.sampled_from([1.0, 1.2]),
            "logprobs": st.sampled_from([-1, 2]),
            "prompt_logprobs": st.sampled_from([-1, 1]),
        }
    ),
    min_size=1,
    max_size=7,
)


@settings(max_examples=60, deadline=None)
@given(
    requests=REQUESTS,
    seqs=st.integers(1, 4),
    more_rows=st.integers(0, 12),
    blocks=st.integers(20, 40),
    block_size=st.integers(2, 5),
    micro_batches=st.integers(0, 2),
    events=st.lists(st.sampled_from(["submit", "turn", "fail", "turn"]), max_size=40),
)
def test_output_is_the_same_as_alone_in_any_batch_chunking_preemption_and_repeat(
    requests, seqs, more_rows, blocks, block_size, micro_batches, events
):
    engine = ToyEngine(
        max_num_seqs=seqs,
        max_batched_tokens=seqs + more_rows,
        kv_blocks=blocks,
        block_size=block_size,
        micro_batches=micro_batches,
    )
    left = list(enumerate(requests))
    for event in [*events, *["submit"] * len(requests)]:
        if event == "submit" and left:
            number, request = left.pop(0)
            assert engine.submit(str(number), **request).ok
        elif event == "turn":
            engine.engine.turn()
        elif event == "fail":
            engine.exchange.failures = 1
            engine.engine.turn()
    engine.exchange.failures = 0
    engine.turns()
    assert {name: r.finishes for name, r in engine.received.items()} == {str(i): 1 for i in range(len(requests))}
    for number, request in enumerate(requests):
        assert engine.received[str(number)] == alone(**request)
    assert_idle(engine)


def test_steps_of_several_rows_are_split_when_told_to():
    engine = ToyEngine(micro_batches=2)
    assert engine.run("r", PROMPT, max_tokens=5, prompt_logprobs=1) == alone(PROMPT, max_tokens=5, prompt_logprobs=1)
    stats = engine.engine.stats
    assert 0 < stats.split_steps < stats.steps  # not those of one row


def test_preemption_really_happens_in_such_a_mix():
    engine = ToyEngine(kv_blocks=13, max_num_seqs=4)
    for number in range(4):
        engine.submit(str(number), PROMPT[number:], max_tokens=20)
    engine.turns()
    assert engine.engine.stats.preemptions > 0
    assert all(r.tokens == alone(PROMPT[int(n) :], max_tokens=20).tokens for n, r in engine.received.items())


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 11), st.sampled_from([0.0, 1.0]), st.sampled_from([0.0, 1.0]))
def test_a_request_resumed_elsewhere_goes_on_as_if_nothing_had_happened(delivered, temperature, penalty):
    given = {**SAMPLED, "temperature": temperature, "presence_penalty": penalty, "min_tokens": 4}
    whole = alone(PROMPT, **given)
    resumed = alone(PROMPT, output=whole.tokens[:delivered], **given)
    assert whole.tokens[:delivered] + resumed.tokens == whole.tokens
    assert whole.logprobs[delivered:] == resumed.logprobs
    assert resumed.finish == whole.finish


# ---- endings ------------------------------------------------------------------------------------------------


def test_a_stop_token_ends_the_output_and_is_its_last_token():
    tokens = alone(PROMPT).tokens
    assert tokens[3] not in tokens[:3]
    got = alone(PROMPT, stop_token_ids=(tokens[3],))
    assert (got.tokens, got.finish, got.stop_token) == (tokens[:4], "stop", tokens[3])


def test_min_tokens_puts_the_stop_off():
    stop = alone(PROMPT).tokens[0]
    got = alone(PROMPT, stop_token_ids=(stop,), min_tokens=3)
    assert len(got.tokens) >= 3
    assert stop not in got.tokens[:3]


def test_the_output_ends_at_max_tokens():
    got = alone(PROMPT, max_tokens=5)
    assert (len(got.tokens), got.finish, got.stop_token) == (5, "length", None)


def test_a_resumed_request_that_was_complete_already_ends_at_once():
    whole = alone(PROMPT, max_tokens=4)
    engine = ToyEngine()
    got = engine.run("r", PROMPT, output=whole.tokens, max_tokens=4)
    assert (got.tokens, got.finish) == ([], "length")
    assert engine.engine.stats.steps == 0
    assert_idle(engine)


# ---- log-probabilities --------------------------------------------------------------------------------------


def test_echo_without_output_brings_one_logprob_for_each_prompt_token():
    got = alone(PROMPT, max_tokens=0, prompt_logprobs=1)
    assert (got.tokens, got.finish, len(got.prompt_logprobs)) == ([], "length", len(PROMPT))
    assert got.prompt_logprobs[0].logprob is None
    assert all(one.logprob < 0 and len(one.top) == 1 for one in got.prompt_logprobs[1:])


def test_prompt_logprobs_are_those_of_the_same_tokens_as_output():
    tokens = alone(PROMPT, max_tokens=6)
    echo = alone(PROMPT + tokens.tokens, max_tokens=0, prompt_logprobs=3)
    spoken = alone(PROMPT, max_tokens=6, logprobs=3)
    assert echo.prompt_logprobs[len(PROMPT) :] == spoken.logprobs


def test_prompt_logprobs_survive_chunks_and_come_with_the_first_token():
    engine = ToyEngine(max_batched_tokens=2, max_num_seqs=2)
    got = engine.run("r", PROMPT, prompt_logprobs=2, max_tokens=3)
    assert got == alone(PROMPT, prompt_logprobs=2, max_tokens=3)
    assert [bool(delta.prompt_logprobs) for _, delta in engine.sent] == [True, False, False]


def test_prompt_logprobs_are_not_made_twice_when_a_preemption_cuts_a_prefill():
    engine = ToyEngine(kv_blocks=8, max_num_seqs=2, max_batched_tokens=2)
    engine.submit("old", PROMPT[:3], max_tokens=20)
    engine.engine.turn()
    got = engine.run("young", PROMPT * 2, prompt_logprobs=1, max_tokens=2)
    assert engine.engine.stats.preemptions > 0
    assert got == alone(PROMPT * 2, prompt_logprobs=1, max_tokens=2)


def test_prompt_logprobs_of_a_resumed_request_were_delivered_before():
    assert alone(PROMPT, output=[7], prompt_logprobs=1).prompt_logprobs == []


def test_logprobs_come_only_when_asked_for():
    assert alone(PROMPT).logprobs == []
    assert [len(one.top) for one in alone(PROMPT, logprobs=0, max_tokens=2).logprobs] == [0, 0]


# ---- delivery -----------------------------------------------------------------------------------------------


def test_the_deltas_of_a_turn_go_to_the_gateways_that_asked():
    engine = ToyEngine()
    engine.submit("a", PROMPT, gateway="g1")
    engine.submit("b", PROMPT, gateway="g2")
    engine.turns()
    assert {(gateway, delta.request_id) for gateway, delta in engine.sent} == {("g1", "a"), ("g2", "b")}


@pytest.mark.parametrize("failures", [0, 1])
def test_cores_are_kept_awake_for_steps_and_no_longer(failures: int):
    engine = ToyEngine()
    engine.exchange.failures = failures
    engine.exchange.idle_wait = lambda timeout: engine.engine.stop()
    engine.submit("r", PROMPT)
    engine.engine.run()
    assert engine.awake.history == [True, False]


def test_a_repeated_submit_is_accepted_and_not_started_again():
    engine = ToyEngine()
    assert engine.submit("r", PROMPT).ok
    assert engine.submit("r", PROMPT).ok
    engine.turns()
    assert engine.submit("r", PROMPT).ok, "finished, but not acknowledged"
    engine.turns()
    assert engine.received["r"].finishes == 1


def test_a_resend_brings_the_rest_again_until_it_is_done():
    engine = ToyEngine()
    tokens = engine.run("r", PROMPT).tokens
    engine.sent.clear()
    assert engine.engine.resend("r", 3).ok
    engine.turns()
    ((_, delta),) = engine.sent
    assert (delta.position, list(delta.tokens), delta.finish) == (3, tokens[3:], "length")
    engine.engine.acknowledge(Ack(gateway="g", received={"r": 8}, done=("r",)))
    engine.turns()
    assert engine.engine.resend("r", 0).code == "unknown"
    assert engine.engine.stats.unacknowledged == 0


def test_a_resend_in_the_middle_of_a_request_brings_what_there_is():
    engine = ToyEngine()
    engine.submit("r", PROMPT)
    for _ in range(3):
        engine.engine.turn()
    engine.sent.clear()
    engine.engine.resend("r", 0)
    engine.engine.turn()
    assert [(d.position, len(d.tokens)) for _, d in engine.sent] == [(0, 3), (3, 1)]


# ---- facts --------------------------------------------------------------------------------------------------


def test_stats_count_what_was_done_and_what_is_left():
    engine = ToyEngine(max_batched_tokens=4, max_num_seqs=1)
    engine.submit("a", PROMPT, max_tokens=3)
    engine.submit("b", PROMPT, max_tokens=3)
    engine.engine.turn()
    stats = engine.engine.stats
    assert (stats.running, stats.waiting, stats.kv_blocks_used) == (1, 1, 3)
    assert stats.outstanding_tokens == 2 * (len(PROMPT) + 3) - 4
    engine.turns()
    stats = engine.engine.stats
    assert (stats.prompt_tokens, stats.reused_tokens) == (9 + 1, 8), "b begins with two blocks of a's"
    assert (stats.generated_tokens, stats.steps) == (6, 8)
    assert dict(stats.finished) == {"length": 2}
    assert_idle(engine)


# ---- prefix cache -------------------------------------------------------------------------------------------


def test_a_prompt_that_begins_like_one_before_is_computed_from_there_and_says_the_same():
    engine = ToyEngine()
    for name, prompt in (("a", PROMPT), ("b", PROMPT), ("c", [*PROMPT[:5], 7, 7, 7])):
        got = engine.run(name, prompt, max_tokens=6)
        assert got == alone(prompt, max_tokens=6)
    stats = engine.engine.stats
    assert (stats.reused_tokens, stats.prompt_tokens) == (8 + 4, 9 + 1 + 4)
    assert_idle(engine)


def test_output_is_reused_too_when_a_conversation_goes_on():
    engine = ToyEngine()
    said = engine.run("a", PROMPT, max_tokens=8).tokens
    longer = [*PROMPT, *said, 5]
    assert engine.run("b", longer, max_tokens=4) == alone(longer, max_tokens=4)
    assert engine.engine.stats.reused_tokens == 16, "the last token's K and V were never computed"


def test_prompt_logprobs_are_computed_for_every_token_all_the_same():
    engine = ToyEngine()
    engine.run("a", PROMPT, max_tokens=2)
    got = engine.run("b", PROMPT, max_tokens=2, prompt_logprobs=1)
    assert got == alone(PROMPT, max_tokens=2, prompt_logprobs=1)
    assert engine.engine.stats.reused_tokens == 0
