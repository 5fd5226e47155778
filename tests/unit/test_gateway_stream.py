"""Server-sent events without a server: keep-alive comments, and generators that are always closed."""

import asyncio
from collections.abc import AsyncGenerator

import pytest

from services.gateway.stream import KEEP_ALIVE, EventStream, keep_alive
from services.gateway.web import ClientGone, until_disconnect


class Source:
    """Yields what is put in; remembers that it was closed."""

    def __init__(self) -> None:
        self.queue: asyncio.Queue[bytes | None] = asyncio.Queue()
        self.closed = False

    async def body(self) -> AsyncGenerator[bytes, None]:
        try:
            while (data := await self.queue.get()) is not None:
                yield data
        finally:
            self.closed = True


async def test_silence_is_filled_with_comments_and_nothing_is_lost():
    source = Source()
    body = keep_alive(source.body(), idle_s=0.01)
    assert [await anext(body) for _ in range(3)] == [KEEP_ALIVE] * 3
    source.queue.put_nowait(b"one")
    while (data := await anext(body)) == KEEP_ALIVE:
        pass
    assert data == b"one"
    source.queue.put_nowait(None)
    assert {data async for data in body} <= {KEEP_ALIVE}
    assert source.closed


async def test_closing_early_closes_what_produces():
    source = Source()
    body = keep_alive(source.body(), idle_s=0.01)
    assert await anext(body) == KEEP_ALIVE
    await body.aclose()
    assert source.closed


async def test_a_client_that_leaves_closes_the_stream():
    source, left, sent = Source(), asyncio.Event(), []

    async def receive() -> dict:
        await left.wait()
        return {"type": "http.disconnect"}

    async def send(message) -> None:
        sent.append(message)
        if message["type"] == "http.response.body":
            left.set()

    source.queue.put_nowait(b"one")
    async with asyncio.timeout(10):
        await EventStream(keep_alive(source.body(), 60))({"type": "http"}, receive, send)
    assert [m.get("body") for m in sent[1:]] == [b"one"]
    assert source.closed


async def test_work_that_fails_or_ends_beats_the_disconnect():
    async def never() -> dict:
        await asyncio.Event().wait()
        raise AssertionError

    async def gone() -> dict:
        return {"type": "http.disconnect"}

    async def answer() -> int:
        return 7

    async def failure() -> int:
        raise ValueError("x")

    assert await until_disconnect(never, answer()) == 7  # type: ignore[arg-type]
    with pytest.raises(ValueError):
        await until_disconnect(never, failure())  # type: ignore[arg-type]
    with pytest.raises(ClientGone):
        await until_disconnect(gone, asyncio.sleep(60))  # type: ignore[arg-type]
