"""Defaults, limits and seeds."""

import pytest

from services.gateway.errors import BadRequest
from services.gateway.protocol import ChatRequest, CompletionRequest
from services.gateway.sampling import (
    Limits,
    check_prompt,
    check_tokens,
    generation_defaults,
    output_limit,
    sampling_params,
)
from shared.errors import ModelError

LIMITS = Limits(context=100, vocab=50, eos=(0,), defaults={})


def complete(**fields) -> CompletionRequest:
    return CompletionRequest.model_validate({"prompt": "x"} | fields)


def chat(**fields) -> ChatRequest:
    return ChatRequest.model_validate({"messages": [{"role": "user", "content": "x"}]} | fields)


def params(request, child=0, limits=LIMITS):
    return sampling_params(request, 5, child, limits)


def test_request_beats_generation_config_beats_openai():
    defaults = generation_defaults({"temperature": 0.6, "top_k": 20, "top_p": 0.9, "eos_token_id": 3})
    limits = Limits(100, 50, (0,), defaults)
    chosen = params(complete(temperature=0.1), limits=limits)
    assert (chosen.temperature, chosen.top_k, chosen.top_p) == (0.1, 20, 0.9)
    assert params(complete()).temperature == 1.0
    assert params(complete(top_k=-1), limits=limits).top_k == 0
    assert params(complete(temperature=0), limits=limits).temperature == 0
    assert params(complete(temperature=1e-6)).temperature == 0


def test_a_bad_generation_config_is_refused_at_start():
    with pytest.raises(ModelError):
        generation_defaults({"temperature": -1})


def test_seeds():
    assert [params(complete(seed=7), child).seed for child in range(3)] == [7, 8, 9]
    assert params(complete(seed=-1)).seed == 2**64 - 1
    assert params(complete(seed=-1), 1).seed == 0
    assert len({params(complete()).seed for _ in range(50)}) == 50


def test_stop_tokens_and_ignore_eos():
    assert params(complete(stop_token_ids=[3])).stop_token_ids == (0, 3)
    assert params(complete(stop_token_ids=[3], ignore_eos=True)).stop_token_ids == (3,)
    assert params(complete(ignore_eos=True)).stop_token_ids == ()


def test_logprobs_of_both_endpoints():
    assert params(complete()).logprobs == -1
    assert params(complete(logprobs=0)).logprobs == 0
    assert params(complete(logprobs=3, echo=True)).prompt_logprobs == 3
    assert params(complete(logprobs=3)).prompt_logprobs == -1
    assert params(chat(logprobs=True)).logprobs == 0
    assert params(chat(logprobs=True, top_logprobs=4)).logprobs == 4
    assert params(chat(logprobs=False)).logprobs == -1


def test_output_limits():
    assert output_limit(complete(), 10, LIMITS) == 16
    assert output_limit(complete(), 95, LIMITS) == 5
    assert output_limit(chat(), 10, LIMITS) == 90
    assert output_limit(chat(max_tokens=3, max_completion_tokens=4), 10, LIMITS) == 4
    assert output_limit(chat(), 10, Limits(100, 50, (0,), {}, max_new_tokens=7)) == 7
    assert output_limit(complete(max_tokens=90), 10, LIMITS) == 90
    assert output_limit(complete(max_tokens=0, echo=True), 100, LIMITS) == 0


@pytest.mark.parametrize(
    ("request_", "prompt", "param"),
    [
        (complete(max_tokens=91), 10, "max_tokens"),
        (complete(), 100, "prompt"),
        (complete(max_tokens=0, echo=True), 101, "prompt"),
        (chat(), 100, "messages"),
        (chat(max_completion_tokens=91), 10, "max_completion_tokens"),
    ],
)
def test_what_does_not_fit_the_context_is_refused(request_, prompt, param):
    with pytest.raises(BadRequest) as caught:
        output_limit(request_, prompt, LIMITS)
    assert (caught.value.param, caught.value.code) == (param, "context_length_exceeded")
    assert "100" in caught.value.message


def test_ids_outside_the_vocabulary_are_refused():
    for fields in ({"logit_bias": {"50": 1.0}}, {"stop_token_ids": [50]}):
        with pytest.raises(BadRequest):
            check_tokens(complete(**fields), LIMITS)
    check_tokens(complete(logit_bias={"49": 1.0}, stop_token_ids=[49]), LIMITS)
    for ids in ([], [50]):
        with pytest.raises(BadRequest):
            check_prompt(ids, LIMITS, "prompt")


def test_min_tokens_above_max_tokens_is_refused():
    with pytest.raises(BadRequest) as caught:
        params(complete(min_tokens=6))
    assert caught.value.param == "min_tokens"
