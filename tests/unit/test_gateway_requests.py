"""The token log: any loss, repeat or disorder of deltas ends in the same tokens."""

from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from services.gateway.requests import PART_TOKENS, Job, OpenRequest, TokenLog
from shared.request_messages import Decision, SamplingParams, TokenDelta, TokenLogprobs

SAMPLING = SamplingParams(max_tokens=10)


def delta(position, tokens, finish=None, **fields):
    return TokenDelta(request_id="r", position=position, tokens=tuple(tokens), finish=finish, **fields)


def drained(log: TokenLog) -> list[int]:
    update = log.take()
    return update.tokens if update else []


@given(st.lists(st.integers(0, 9), min_size=1, max_size=20), st.lists(st.integers(1, 4), max_size=20), st.randoms())
def test_any_order_any_repeats_with_resends(tokens, sizes, random):
    """A sender that cuts the tokens anywhere, doubles and shuffles them, and repeats from where the log asks."""
    edges = [0]
    for size in sizes:
        edges.append(min(edges[-1] + size, len(tokens)))
    edges = sorted({*edges, len(tokens)})
    deltas = [delta(a, tokens[a:b], "length" if b == len(tokens) else None) for a, b in pairwise(edges)]
    log, seen = TokenLog(), []
    noisy = deltas * 2
    random.shuffle(noisy)
    for one in noisy[: len(deltas)]:
        log.apply(one)
        seen += drained(log)
    if not log.finish:
        log.apply(delta(len(log.tokens), tokens[len(log.tokens) :], "length"))
        seen += drained(log)
    assert log.tokens == seen == tokens
    assert log.finish == "length"


def test_a_gap_is_noticed_and_nothing_is_taken():
    log = TokenLog()
    assert log.apply(delta(0, [1]))
    assert not log.apply(delta(2, [3], "length"))
    assert log.tokens == [1] and log.finish is None
    assert log.apply(delta(1, [2, 3], "length"))
    assert log.tokens == [1, 2, 3] and log.finish == "length"


def test_the_end_is_told_once():
    log = TokenLog()
    log.apply(delta(0, [1], "stop", stop_token=1))
    update = log.take()
    assert update and (update.finish, update.stop_token) == ("stop", 1)
    log.apply(delta(0, [1], "stop"))
    log.apply(delta(1, [5], "length"))
    assert log.take() is None and log.tokens == [1]


def test_tokens_before_the_prompt_logprobs_count_as_a_gap():
    log = TokenLog(prompt_logprobs=1)
    assert not log.apply(delta(0, [1]))
    prompt = (TokenLogprobs(logprob=None),)
    assert log.apply(delta(0, [1], prompt_logprobs=prompt))
    assert log.apply(delta(0, [1], prompt_logprobs=prompt))
    update = log.take()
    assert update and update.prompt_logprobs == prompt and update.tokens == [1]
    assert log.take() is None


def test_long_prompt_logprobs_come_in_parts():
    """In any order, doubled, and told at once when they are complete; a prompt alone has an end as well."""
    every = tuple(TokenLogprobs(logprob=-float(i)) for i in range(5))
    parts = [delta(0, [], prompt_logprobs=every[a : a + 2], prompt_start=a) for a in (0, 2)]
    last = delta(0, [], "length", prompt_logprobs=every[4:], prompt_start=4)
    log = TokenLog(prompt_logprobs=5)
    assert not log.apply(parts[1])
    assert not log.apply(last) and log.finish is None
    for part in (parts[0], parts[0], parts[1]):
        assert log.apply(part) and log.take() is None
    assert log.apply(last)
    update = log.take()
    assert update and update.prompt_logprobs == every and update.finish == "length"


def test_a_failure_is_no_news_and_can_be_forgotten():
    log = TokenLog()
    log.apply(delta(0, [1]))
    log.apply(delta(1, [], "error", error=Decision(ok=False, code="draining")))
    update = log.take()
    assert update and update.finish is None and update.tokens == [1]
    assert log.finish == "error" and log.error and log.error.code == "draining"
    log.reopen()
    assert log.apply(delta(1, [2], "length"))
    update = log.take()
    assert update and (update.tokens, update.finish) == ([2], "length")


def test_long_prompts_travel_in_parts_and_output_in_the_last():
    prompt = list(range(2 * PART_TOKENS + 5))
    request = OpenRequest(Job(0, prompt, SAMPLING))
    request.assign("attention-1", 1)
    request.log.apply(TokenDelta(request_id=request.id, position=0, tokens=(7, 8)))
    parts = request.submits("gateway-1", 5.0, may_wait=True)
    assert [(p.part, p.parts) for p in parts] == [(0, 3), (1, 3), (2, 3)]
    assert b"".join(p.prompt for p in parts) == b"".join(t.to_bytes(4, "little") for t in prompt)
    assert [len(p.output) for p in parts] == [0, 0, 8]
    assert all(len(p.encode()) < 512 * 1024 for p in parts)


def test_every_placement_has_its_own_id():
    request = OpenRequest(Job(0, [1], SAMPLING))
    request.assign("a", 1)
    first = request.id
    request.assign("b", 2)
    assert request.id != first
