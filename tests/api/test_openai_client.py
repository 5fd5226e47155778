"""The official client, sync and async, against any mesh (fixture ``api_url``)."""

import asyncio

import httpx
import openai
import pytest

PROMPT = "In the beginning"
MESSAGES = [{"role": "user", "content": "Tell me of the sea."}]
LONG = {"prompt": PROMPT, "max_tokens": 40, "seed": 11, "extra_body": {"ignore_eos": True}}


@pytest.fixture
def client(api_url: str) -> openai.OpenAI:
    return openai.OpenAI(base_url=api_url + "/v1", api_key="none", max_retries=0, timeout=60)


@pytest.fixture
def aclient(api_url: str) -> openai.AsyncOpenAI:
    return openai.AsyncOpenAI(base_url=api_url + "/v1", api_key="none", max_retries=0, timeout=60)


@pytest.fixture
def model(client: openai.OpenAI) -> str:
    return client.models.list().data[0].id


def test_models(client, model):
    assert client.models.retrieve(model).id == model
    with pytest.raises(openai.NotFoundError) as caught:
        client.models.retrieve("nobody")
    assert caught.value.code == "model_not_found"


def test_completion(client, model):
    found = client.completions.create(model=model, **LONG)
    assert found.object == "text_completion" and found.id.startswith("cmpl-")
    assert found.choices[0].finish_reason == "length"
    assert found.usage.completion_tokens == 40
    assert found.usage.total_tokens == found.usage.prompt_tokens + 40


def test_special_tokens_are_shown_when_asked_for(client, model):
    def text(**extra):
        body = {"model": model, "prompt": [0, 72, 72], "max_tokens": 1, "seed": 1, "echo": True}
        return client.completions.create(**body, extra_body={"ignore_eos": True, **extra}).choices[0].text

    assert text().startswith("hh") and text(skip_special_tokens=True) == text()
    assert text(skip_special_tokens=False).startswith("<|endoftext|>hh")


def test_the_last_message_can_be_continued(client, model):
    messages = [*MESSAGES, {"role": "assistant", "content": "The sea is "}]
    body = {"model": model, "messages": messages, "max_tokens": 8, "seed": 3}
    found = client.chat.completions.create(**body, extra_body={"continue_final_message": True, "ignore_eos": True})
    prompt = f"{MESSAGES[0]['content']}The sea is "  # the demo's template puts messages one behind the other
    text = client.completions.create(model=model, prompt=prompt, max_tokens=8, seed=3, extra_body={"ignore_eos": True})
    assert found.choices[0].message.content == text.choices[0].text
    for extra, param in (
        ({"continue_final_message": True, "add_generation_prompt": True}, "continue_final_message"),
        ({"chat_template_kwargs": {"tools": []}}, "chat_template_kwargs"),
    ):
        with pytest.raises(openai.BadRequestError) as caught:
            client.chat.completions.create(**body, extra_body=extra)
        assert caught.value.param == param
    kwargs = {"enable_thinking": False}
    client.chat.completions.create(**body, extra_body={"add_generation_prompt": False, "chat_template_kwargs": kwargs})


def test_unknown_model_is_404(client):
    with pytest.raises(openai.NotFoundError) as caught:
        client.completions.create(model="nobody", prompt="x")
    assert caught.value.param == "model"


def test_joined_stream_equals_the_plain_text(client, model):
    plain = client.completions.create(model=model, **LONG)
    chunks = list(client.completions.create(model=model, stream=True, **LONG))
    assert "".join(c.choices[0].text for c in chunks) == plain.choices[0].text
    assert [c.choices[0].finish_reason for c in chunks].count("length") == 1
    assert len({(c.id, c.created) for c in chunks}) == 1
    assert all(c.usage is None for c in chunks)


def test_seed_makes_it_repeatable(client, model):
    def text(seed):
        return client.completions.create(model=model, **(LONG | {"seed": seed})).choices[0].text

    assert text(3) == text(3)
    assert text(3) != text(4)
    unseeded = [client.completions.create(model=model, prompt=PROMPT, max_tokens=20).choices[0].text for _ in range(2)]
    assert unseeded[0] != unseeded[1]


def test_n_choices_have_consecutive_seeds_and_share_the_prompt_in_usage(client, model):
    several = client.completions.create(model=model, n=3, **LONG)
    assert [c.index for c in several.choices] == [0, 1, 2]
    alone = [client.completions.create(model=model, **(LONG | {"seed": 11 + i})) for i in range(3)]
    assert [c.text for c in several.choices] == [a.choices[0].text for a in alone]
    assert several.usage.prompt_tokens == alone[0].usage.prompt_tokens
    assert several.usage.completion_tokens == 120


def test_choices_of_several_prompts_are_numbered_across_prompts(client, model):
    prompts = [PROMPT, "def f(x):"]
    both = client.completions.create(model=model, n=2, **(LONG | {"prompt": prompts}))
    second = client.completions.create(model=model, n=2, **(LONG | {"prompt": prompts[1]}))
    assert [c.index for c in both.choices] == [0, 1, 2, 3]
    assert [c.text for c in both.choices[2:]] == [c.text for c in second.choices]


def test_token_prompts_equal_text_prompts(client, model, api_url):
    ids = httpx.post(api_url + "/tokenize", json={"prompt": PROMPT}).json()["tokens"]
    by_text = client.completions.create(model=model, **LONG).choices[0].text
    for prompt in (ids, [ids]):
        assert client.completions.create(model=model, **(LONG | {"prompt": prompt})).choices[0].text == by_text


def test_stop_string_ends_and_is_left_out(client, model):
    whole = client.completions.create(model=model, **LONG).choices[0].text
    stop = whole[12:15]
    found = client.completions.create(model=model, stop=stop, **LONG)
    chunks = list(client.completions.create(model=model, stop=[stop, "\0never"], stream=True, **LONG))
    assert found.choices[0].text == whole[: whole.find(stop)]
    assert found.choices[0].finish_reason == "stop"
    assert "".join(c.choices[0].text for c in chunks) == found.choices[0].text
    assert chunks[-1].choices[0].finish_reason == "stop"
    assert found.usage.completion_tokens < 40


def test_completion_logprobs_and_echo(client, model):
    found = client.completions.create(model=model, logprobs=2, echo=True, **LONG).choices[0]
    logprobs = found.logprobs
    assert found.text.startswith(PROMPT)
    assert logprobs.token_logprobs[0] is None and logprobs.top_logprobs[0] is None
    assert all(value <= 0 for value in logprobs.token_logprobs[1:])
    assert len(logprobs.tokens) == len(logprobs.token_logprobs) == len(logprobs.text_offset)
    for token, offset in zip(logprobs.tokens, logprobs.text_offset, strict=True):
        if not token.startswith("bytes:") and found.text[offset : offset + 1] != "\ufffd":
            assert found.text[offset : offset + len(token)] == token
    for token, top in zip(logprobs.tokens[1:], logprobs.top_logprobs[1:], strict=True):
        assert token in top and len(top) <= 3


def test_streamed_logprobs_equal_plain_ones(client, model):
    plain = client.completions.create(model=model, logprobs=1, echo=True, **LONG).choices[0].logprobs
    chunks = client.completions.create(model=model, logprobs=1, echo=True, stream=True, **LONG)
    parts = [c.choices[0].logprobs for c in chunks if c.choices[0].logprobs]
    for name in ("tokens", "token_logprobs", "text_offset"):
        assert [x for p in parts for x in getattr(p, name)] == getattr(plain, name)


def test_echo_alone_scores_the_prompt(client, model):
    found = client.completions.create(model=model, prompt=PROMPT, max_tokens=0, echo=True, logprobs=0)
    assert found.choices[0].text == PROMPT
    assert "".join(found.choices[0].logprobs.tokens) == PROMPT
    assert found.usage.completion_tokens == 0
    assert found.choices[0].finish_reason == "length"


def test_chat(client, model):
    found = client.chat.completions.create(
        model=model, messages=MESSAGES, max_completion_tokens=12, seed=5, logprobs=True, top_logprobs=2
    )
    choice = found.choices[0]
    assert found.object == "chat.completion" and choice.message.role == "assistant"
    assert len(choice.logprobs.content) == found.usage.completion_tokens
    for entry in choice.logprobs.content:
        assert len(entry.top_logprobs) == 2
        assert bytes(entry.bytes).decode(errors="replace") == entry.token


def test_chat_stream(client, model):
    ask = {"model": model, "messages": MESSAGES, "max_tokens": 12, "seed": 5, "n": 2}
    plain = client.chat.completions.create(**ask)
    chunks = list(client.chat.completions.create(stream=True, stream_options={"include_usage": True}, **ask))
    assert chunks[-1].choices == [] and chunks[-1].usage == plain.usage
    for index in range(2):
        mine = [c.choices[0] for c in chunks if c.choices and c.choices[0].index == index]
        assert mine[0].delta.role == "assistant" and mine[0].delta.content == ""
        assert "".join(c.delta.content or "" for c in mine) == plain.choices[index].message.content
        assert [c.finish_reason for c in mine if c.finish_reason] == [plain.choices[index].finish_reason]


def test_chat_fills_the_context_by_default(client, model):
    limit = client.models.retrieve(model).max_model_len  # type: ignore[attr-defined]
    found = client.chat.completions.create(
        model=model,
        messages=[{"role": "user", "content": " the" * (limit - 20)}],
        extra_body={"ignore_eos": True},
    )
    assert found.usage.completion_tokens < 40
    assert found.usage.total_tokens == limit


def test_return_token_ids(client, model):
    body = {"return_token_ids": True, "ignore_eos": True}
    found = client.completions.create(model=model, prompt=PROMPT, max_tokens=5, seed=1, extra_body=body).choices[0]
    chunks = list(
        client.completions.create(model=model, prompt=PROMPT, max_tokens=5, seed=1, stream=True, extra_body=body)
    )
    streamed = [t for c in chunks for t in c.choices[0].token_ids]
    assert streamed == found.token_ids and len(streamed) == 5
    assert chunks[0].choices[0].prompt_token_ids == found.prompt_token_ids


async def test_async_client_many_at_once(aclient):
    async def text(seed: int, stream: bool) -> str:
        ask = LONG | {"model": (await aclient.models.list()).data[0].id, "seed": seed}
        if not stream:
            return (await aclient.completions.create(**ask)).choices[0].text
        return "".join([c.choices[0].text async for c in await aclient.completions.create(stream=True, **ask)])

    both = await asyncio.gather(*(text(seed, stream) for stream in (False, True) for seed in range(8)))
    assert both[:8] == both[8:]


async def test_async_chat_stream(aclient):
    model = (await aclient.models.list()).data[0].id
    stream = await aclient.chat.completions.create(model=model, messages=MESSAGES, max_tokens=4, stream=True)
    assert [c async for c in stream][-1].choices[0].finish_reason in ("length", "stop")


def test_errors_name_the_field(client, model):
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(
            model=model, messages=MESSAGES, tools=[{"type": "function", "function": {"name": "f"}}]
        )
    assert caught.value.param == "tools"
    assert caught.value.response.headers["x-request-id"]


def test_errors_in_a_stream_keep_their_status(client, model):
    with pytest.raises(openai.BadRequestError):
        client.completions.create(model=model, prompt="x", max_tokens=10**6, stream=True)
