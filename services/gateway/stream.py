"""Server-sent events: framing, keep-alive comments, errors after the headers, a response that stops with its client."""

import asyncio
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any

import pydantic_core
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from services.gateway.answers import Answer
from services.gateway.choices import Piece
from services.gateway.errors import as_api_error
from services.gateway.metrics import GatewayMetrics
from services.gateway.web import ClientGone, until_disconnect
from shared.errors import MoemeshError

KEEP_ALIVE_S = 15.0
KEEP_ALIVE = b": keep-alive\n\n"
DONE = b"data: [DONE]\n\n"


def event(data: dict[str, Any]) -> bytes:
    return b"data: " + pydantic_core.to_json(data) + b"\n\n"


async def events(
    answer: Answer[Any], first: Piece, pieces: AsyncGenerator[Piece, None], metrics: GatewayMetrics
) -> AsyncGenerator[bytes, None]:
    """The body of a stream. A failure becomes an error event, because the status has been sent.

    Args:
        first: piece that was pulled before the headers; ``pieces`` brings the others and is closed here.
    """
    async with aclosing(pieces):
        try:
            for chunk in answer.chunks(first):
                yield event(chunk)
            async for piece in pieces:
                for chunk in answer.chunks(piece):
                    yield event(chunk)
            if answer.include_usage:
                yield event(answer.usage_chunk())
        except MoemeshError as error:
            failure = as_api_error(error)
            metrics.error(failure)
            yield event(failure.body())
        yield DONE


async def keep_alive(body: AsyncGenerator[bytes, None], idle_s: float = KEEP_ALIVE_S) -> AsyncGenerator[bytes, None]:
    """``body`` with a comment after every ``idle_s`` seconds of silence.

    One retained task waits for the next event: a timeout must not cancel what produces it.
    """
    pending: asyncio.Task[bytes] | None = None
    try:
        while True:
            pending = pending or asyncio.create_task(anext(body))  # type: ignore[arg-type]
            done, _ = await asyncio.wait({pending}, timeout=idle_s)
            if not done:
                yield KEEP_ALIVE
                continue
            try:
                data = pending.result()
            except StopAsyncIteration:
                return
            pending = None
            yield data
    finally:
        if pending and not pending.done():
            pending.cancel()
            await asyncio.gather(pending, return_exceptions=True)
        await body.aclose()


class EventStream(Response):
    """Sends a generator's bytes and closes it when the client goes."""

    media_type = "text/event-stream"

    def __init__(self, body: AsyncGenerator[bytes, None]) -> None:
        self.status_code = 200
        self.background = None
        self._body = body
        self.init_headers({"cache-control": "no-cache", "x-accel-buffering": "no"})

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await until_disconnect(receive, self._send_all(send))
        except ClientGone:
            return

    async def _send_all(self, send: Send) -> None:
        async with aclosing(self._body):
            await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
            async for data in self._body:
                await send({"type": "http.response.body", "body": data, "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})
