"""Server-sent events, byte by byte over a real socket (any mesh)."""

import pytest

from tests.api.sse import post

BODY = {"prompt": "In the beginning", "max_tokens": 6, "seed": 2, "ignore_eos": True, "stream": True}


async def read(api_url: str, path: str = "/v1/completions", **body):
    async with post(api_url, path, BODY | body) as stream:
        return stream, await stream.all()


async def test_framing(api_url):
    stream, events = await read(api_url)
    assert stream.status == 200
    assert stream.headers["content-type"].startswith("text/event-stream")
    assert events[-1] == "[DONE]" and events.count("[DONE]") == 1
    assert stream.lines[1::2] == [""] * (len(stream.lines) // 2)
    assert all(line.startswith("data: ") for line in stream.lines[::2])
    assert all(e["object"] == "text_completion" for e in events[:-1])
    assert all("usage" not in e for e in events[:-1])


async def test_include_usage_adds_one_chunk_and_nulls(api_url):
    _, events = await read(api_url, stream_options={"include_usage": True})
    *chunks, last, done = events
    assert done == "[DONE]" and last["choices"] == []
    assert last["usage"]["completion_tokens"] == 6
    assert all(c["usage"] is None and c["choices"] for c in chunks)


async def test_continuous_usage_counts_up(api_url):
    _, events = await read(api_url, stream_options={"include_usage": True, "continuous_usage_stats": True})
    counts = [e["usage"]["completion_tokens"] for e in events[:-1]]
    assert counts == sorted(counts) and counts[-1] == 6


async def test_chat_chunks(api_url):
    body = {"messages": [{"role": "user", "content": "hi"}], "prompt": None}
    body = {k: v for k, v in (BODY | body).items() if k != "prompt"}
    async with post(api_url, "/v1/chat/completions", body) as stream:
        events = await stream.all()
    assert events[0]["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    assert all(e["object"] == "chat.completion.chunk" for e in events[:-1])
    assert sum(e["choices"][0]["finish_reason"] is not None for e in events[:-1]) == 1


async def test_request_ids_are_echoed_when_sane(api_url):
    async with post(api_url, "/v1/completions", BODY, x_request_id="abc-123") as stream:
        assert stream.headers["x-request-id"] == "abc-123"
    async with post(api_url, "/v1/completions", BODY, x_request_id="x" * 500) as stream:
        assert stream.headers["x-request-id"] != "x" * 500


@pytest.mark.parametrize("body", [{"prompt": ""}, {"temperature": 9}, {"stream_options": {"x": 1}}])
async def test_early_errors_have_a_status_and_no_events(api_url, body):
    async with post(api_url, "/v1/completions", BODY | body) as stream:
        assert stream.status == 400
        assert stream.headers["content-type"] == "application/json"
