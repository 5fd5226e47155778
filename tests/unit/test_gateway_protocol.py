"""Request validation: every field is honoured, neutral, or refused with its name."""

import json
import time

import pytest

from services.gateway.errors import BadRequest
from services.gateway.protocol import ChatRequest, CompletionRequest, DetokenizeRequest, TokenizeRequest, parse
from services.gateway.unsupported import NEUTRAL

COMPLETION = {"prompt": "x"}
CHAT = {"messages": [{"role": "user", "content": "x"}]}


def complete(**fields):
    request = parse(CompletionRequest, json.dumps(COMPLETION | fields).encode())
    request.check()
    return request


def chat(**fields):
    request = parse(ChatRequest, json.dumps(CHAT | fields).encode())
    request.check()
    return request


def refused(make, **fields) -> BadRequest:
    with pytest.raises(BadRequest) as caught:
        make(**fields)
    return caught.value


@pytest.mark.parametrize("make", [complete, chat])
def test_the_supported_fields_are_accepted_together(make):
    make(
        model="demo", temperature=0.5, top_p=0.9, n=2, stop=["a", "b"], seed=-1, stream=True,
        stream_options={"include_usage": True, "continuous_usage_stats": True}, presence_penalty=1,
        frequency_penalty=-2, logit_bias={"5": -100}, user="me", top_k=-1, min_p=0.1, repetition_penalty=1.1,
        min_tokens=1, stop_token_ids=[3], ignore_eos=True, return_token_ids=True, max_tokens=5,
        store=True, metadata={"a": "b"}, skip_special_tokens=False,
    )  # fmt: skip


@pytest.mark.parametrize("make", [complete, chat])
@pytest.mark.parametrize("field", [f for f in NEUTRAL if f not in ("echo", "best_of")])
def test_null_is_neutral_and_other_values_are_refused_by_name(make, field):
    make(**{field: None})
    if make is chat and field == "chat_template_kwargs":
        return
    if field in ("prompt_cache_key", "safety_identifier", "parallel_tool_calls"):
        make(**{field: True})
        return
    error = refused(make, **{field: {"something": "else"}})
    assert (error.status, error.param) == (400, field)
    assert field in error.message


@pytest.mark.parametrize(
    "fields",
    [
        {"tools": None}, {"tool_choice": "none"}, {"parallel_tool_calls": True}, {"response_format": {"type": "text"}},
        {"service_tier": "auto"}, {"suffix": ""}, {"best_of": 1}, {"modalities": ["text"]}, {"logprobs": None},
        {"skip_special_tokens": True}, {"length_penalty": 1.0}, {"stop": None}, {"stop": []}, {"echo": False},
        {"stream_options": None}, {"max_tokens": None}, {"priority": 0}, {"logit_bias": {}},
    ],
)  # fmt: skip
def test_neutral_values_pass(fields):
    complete(**fields)
    chat(**fields)


@pytest.mark.parametrize(
    "fields",
    [
        {"tools": []}, {"tools": [{"type": "function"}]}, {"suffix": "x"}, {"best_of": 3}, {"use_beam_search": True},
        {"response_format": {"type": "json_object"}}, {"skip_special_tokens": 1}, {"temperature": 2.1},
        {"temperature": -0.1}, {"temperature": "1"}, {"top_p": 0}, {"top_p": 1.5}, {"n": 0}, {"n": 1.5}, {"n": True},
        {"max_tokens": -1}, {"max_tokens": 0}, {"stop": ""}, {"stop": ["a", ""]}, {"stop": list("abcde")},
        {"presence_penalty": 3}, {"frequency_penalty": -3}, {"logit_bias": {"x": 1}}, {"logit_bias": {"1": 101}},
        {"top_k": -2}, {"min_p": 2}, {"repetition_penalty": 0}, {"repetition_penalty": 5e-324}, {"min_tokens": -1},
        {"stop_token_ids": [-1]},
        {"seed": 2**63}, {"stream": "yes"}, {"stream_options": {"include_usage": True}}, {"banana": None},
        {"user": 5}, {"model": 5}, {"continue_final_message": 1}, {"add_generation_prompt": "yes"},
    ],
)  # fmt: skip
@pytest.mark.parametrize("make", [complete, chat])
def test_wrong_values_are_refused_by_name(make, fields):
    error = refused(make, **fields)
    assert error.status == 400
    assert error.param == next(iter(fields))
    assert str(error.param) in error.message


@pytest.mark.parametrize(
    "prompt", ["", [], [""], ["a", ""], [[]], [[1], []], 5, None, [1, "a"], ["a", 1], [-1], [True], {}, [1.5]]
)
def test_wrong_prompts_are_refused(prompt):
    assert refused(complete, prompt=prompt).param == "prompt"


@pytest.mark.parametrize(
    ("prompt", "count"), [("a", 1), (["a", "b"], 2), ([1, 2, 3], 1), ([[1], [2, 3]], 2), (["a"], 1)]
)
def test_all_four_forms_of_prompts(prompt, count):
    assert len(complete(prompt=prompt).prompts) == count


@pytest.mark.parametrize(
    "content", [[{"type": "image_url", "image_url": {"url": "x"}}], [{"type": "input_audio"}], None, 5]
)
def test_content_that_is_no_text_is_refused(content):
    assert refused(chat, messages=[{"role": "user", "content": content}]).param == "messages"


def test_text_parts_are_joined_with_line_breaks():
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    request = chat(messages=[{"role": "user", "content": parts}])
    assert request.messages[0].plain() == {"role": "user", "content": "a\nb"}


def test_chat_rules():
    assert refused(chat, messages=[]).param == "messages"
    assert refused(chat, messages=[{"role": "alien", "content": "x"}]).param == "messages"
    assert refused(chat, top_logprobs=2).param == "top_logprobs"
    assert refused(chat, top_logprobs=21, logprobs=True).param == "top_logprobs"
    assert refused(chat, echo=True).param == "echo"
    assert refused(chat, prompt="x").param == "prompt"
    assert refused(chat, max_completion_tokens=0).param == "max_completion_tokens"
    chat(top_logprobs=0, logprobs=True)
    chat(messages=[{"role": "assistant", "content": None, "tool_calls": []}, {"role": "tool", "content": "x"}])


def test_how_messages_become_a_prompt():
    assert chat().turn == chat(continue_final_message=False, chat_template_kwargs={}).turn == "assistant"
    assert chat(add_generation_prompt=False).turn == "none"
    assert chat(continue_final_message=True).turn == "continue"
    assert chat(continue_final_message=True, add_generation_prompt=False).turn == "continue"
    both = refused(chat, continue_final_message=True, add_generation_prompt=True)
    assert both.param == "continue_final_message" and "add_generation_prompt" in both.message
    own = refused(chat, chat_template_kwargs={"messages": [], "enable_thinking": False})
    assert own.param == "chat_template_kwargs" and "messages" in own.message
    assert refused(chat, chat_template_kwargs={str(i): 1 for i in range(65)}).param == "chat_template_kwargs"
    assert refused(chat, chat_template_kwargs="x").param == "chat_template_kwargs"


def test_tokenize_takes_template_fields_with_messages_only():
    for fields, name in (({"add_generation_prompt": False}, "add_generation_prompt"),):
        parse(TokenizeRequest, json.dumps(CHAT | fields).encode()).check()
        with pytest.raises(BadRequest) as caught:
            parse(TokenizeRequest, json.dumps(COMPLETION | fields).encode()).check()
        assert caught.value.param == name


def test_best_of_must_be_n():
    complete(best_of=2, n=2)
    assert refused(complete, best_of=2, n=1).param == "best_of"


def test_max_tokens_zero_needs_echo():
    complete(max_tokens=0, echo=True)


@pytest.mark.parametrize(
    "body",
    [b"", b"{", b"[]", b"null", b'{"prompt": NaN}', b'{"prompt": "\xff"}', b'{"prompt": "\\ud800"}',
     b"[" * 100_000, b'{"prompt":' + b"[" * 5000 + b"]" * 5000 + b"}", b'{"n": ' + b"9" * 10_000 + b"}"],
)  # fmt: skip
def test_bodies_that_are_no_good_json(body):
    with pytest.raises(BadRequest):
        parse(CompletionRequest, body)


def test_at_most_ten_violations_are_listed():
    error = refused(complete, **{f"unknown_{i}": 1 for i in range(30)})
    assert error.message.count("unknown field") == 10
    assert "and 20 more" in error.message


def test_values_are_not_repeated_in_messages():
    assert "secret" not in refused(complete, temperature="secret").message


@pytest.mark.parametrize(
    ("kind", "body", "param"),
    [
        (CompletionRequest, {"prompt": [None] * 300_000}, "prompt"),
        (CompletionRequest, {"prompt": "x", "logit_bias": {f"t{i}": "x" for i in range(100_000)}}, "logit_bias"),
        (CompletionRequest, {"prompt": "x"} | {f"f{i}": 1 for i in range(100_000)}, "f0"),
        (ChatRequest, {"messages": [None] * 300_000}, "messages"),
        (ChatRequest, {"messages": [{"role": "user", "content": [None] * 300_000}]}, "messages"),
        (DetokenizeRequest, {"tokens": [-1] * 300_000}, "tokens"),
    ],
)  # fmt: skip
def test_a_great_many_violations_are_refused_in_no_time(kind, body, param):
    data = json.dumps(body).encode()
    start = time.thread_time()
    with pytest.raises(BadRequest) as caught:
        parse(kind, data)
    assert time.thread_time() - start < 0.25, "describing each of them takes seconds"
    assert caught.value.param == param


def test_unknown_fields_are_refused_behind_many_neutral_ones():
    fields = dict.fromkeys(NEUTRAL) | {f"f{i}": 1 for i in range(1000)}
    assert refused(complete, **fields).param == "f0"
