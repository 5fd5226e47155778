"""Output is kept until it is acknowledged, can be had again from any position, and fits into messages."""

from collections.abc import Iterable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.attention.outbox import LINGER_S, Outbox, pack
from shared.request_messages import Ack, TokenDelta, TokenLogprobs, Tokens


def box(tokens: Iterable[int] = range(10), base=0, **fields) -> Any:
    outbox = Outbox()
    entry = outbox.open("r", "g", base, deadline=100.0)
    entry.tokens += tokens
    for name, value in fields.items():
        setattr(entry, name, value)
    return outbox


def received(position, gateway="g"):
    return Ack(gateway=gateway, received={"r": position})


def test_a_resend_brings_everything_from_the_position_on_with_the_end():
    delta = box(finish="stop", stop_token=9).since("r", 7)
    assert (delta.position, delta.tokens, delta.finish, delta.stop_token) == (7, (7, 8, 9), "stop", 9)


def test_a_resend_of_what_was_acknowledged_starts_where_the_memory_does():
    outbox = box()
    assert outbox.acknowledge(received(4)) == []
    assert (outbox.since("r", 0).position, outbox.since("r", 0).tokens) == (4, (4, 5, 6, 7, 8, 9))


def test_there_is_nothing_to_resend_when_all_has_arrived():
    outbox = box()
    assert outbox.since("r", 10) is None
    assert outbox.since("r", 99) is None
    assert outbox.since("nobody", 0) is None


def test_positions_of_a_resumed_request_go_on_from_what_was_delivered():
    delta = box(tokens=[50, 51], base=20).since("r", 21)
    assert (delta.position, delta.tokens) == (21, (51,))


def test_an_acknowledgement_beyond_the_end_or_from_before_changes_nothing_else():
    outbox = box()
    outbox.acknowledge(received(1000))
    assert outbox.get("r").end == 10
    outbox.acknowledge(received(3))
    assert (outbox.get("r").base, outbox.get("r").end) == (10, 10)


def test_only_the_gateway_that_asked_may_acknowledge():
    outbox = box(finish="length")
    assert outbox.acknowledge(Ack(gateway="other", received={"r": 5}, done=("r",))) == []
    assert len(outbox.since("r", 0).tokens) == 10


def test_a_running_request_is_not_forgotten_by_done_nor_by_time():
    outbox = box()
    assert outbox.acknowledge(Ack(gateway="g", done=("r",))) == []
    assert outbox.expire(1e9) == []


def test_a_finished_request_is_forgotten_when_done_or_some_time_after_its_deadline():
    assert box(finish="length").acknowledge(Ack(gateway="g", done=("r", "unknown"))) == ["r"]
    outbox = box(finish="length")
    assert outbox.expire(100.0 + LINGER_S - 1) == []
    assert outbox.expire(100.0 + LINGER_S) == ["r"]
    assert len(outbox) == 0


def test_logprobs_are_forgotten_with_their_tokens_and_those_of_the_prompt_with_the_first():
    values = [TokenLogprobs(logprob=-float(i)) for i in range(10)]
    outbox = box(logprobs=list(values), prompt_logprobs=(TokenLogprobs(logprob=None),))
    assert len(outbox.since("r", 0).prompt_logprobs) == 1
    assert outbox.since("r", 1).prompt_logprobs == ()
    outbox.acknowledge(received(6))
    assert outbox.since("r", 8).logprobs == tuple(values[8:])
    assert outbox.get("r").prompt_logprobs == ()


# ---- packing ------------------------------------------------------------------------------------------------


def delta(name, count, tops=0, prompt=0):
    logprob = TokenLogprobs(logprob=-1.25, rank=3, top=tuple((100_000 + i, -2.5) for i in range(tops)))
    return TokenDelta(
        request_id=name * 32, position=0, tokens=tuple(range(100_000, 100_000 + count)), finish="stop",
        logprobs=(logprob,) * count if tops else (), prompt_logprobs=(logprob,) * prompt,
    )  # fmt: skip


def joined(deltas):
    tokens: list[int] = []
    logprobs, prompt, finishes = [], [], []
    for one in deltas:
        assert one.position == len(tokens)
        assert not one.prompt_logprobs or one.prompt_start == len(prompt)
        tokens += one.tokens
        logprobs += one.logprobs
        prompt += one.prompt_logprobs
        finishes += [one.finish] if one.finish else []
    return tokens, logprobs, prompt, finishes


@given(st.integers(0, 200), st.sampled_from([0, 1, 20]), st.integers(0, 80), st.integers(1200, 20_000))
def test_a_long_delta_is_cut_into_messages_that_fit_and_join_to_the_same(count, tops, prompt, limit):
    whole = delta("a", count, tops, prompt)
    groups = list(pack([whole], limit))
    assert joined(one for group in groups for one in group) == joined([whole])
    for group in groups:
        assert len(Tokens(attention="attention-123456", deltas=group).encode()) <= limit + 100


def test_many_small_deltas_travel_in_few_messages_and_in_order():
    deltas = [delta(str(i % 10), 1) for i in range(100)]
    groups = list(pack(deltas, 5000))
    assert [one for group in groups for one in group] == deltas
    assert 1 < len(groups) < 20


@pytest.mark.parametrize("deltas", [[], [delta("a", 3)]])
def test_what_fits_is_not_touched(deltas):
    assert [list(group) for group in pack(deltas)] == ([deltas] if deltas else [])
