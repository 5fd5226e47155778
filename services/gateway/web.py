"""What HTTP needs around a handler: bounded JSON bodies, clients that leave, request ids, bearer keys."""

import asyncio
import hmac
import re
import uuid
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any, TypeVar

from fastapi import Request
from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from services.gateway.errors import ApiError, BadRequest
from shared.errors import MoemeshError

T = TypeVar("T")
BODY_LIMIT_S = 60.0
REQUEST_ID = re.compile(r"[\x21-\x7e]{1,128}")


class ClientGone(MoemeshError):
    """The client closed the connection; there is nobody to answer."""


async def read_json(request: Request, limit: int) -> bytes:
    """The body, at most ``limit`` bytes, counted as it comes in.

    Raises ApiError: 400 for another content type, 413 when it is too large, 408 when it does not arrive. Raises
    ClientGone when the connection ends first.
    """
    kind = request.headers.get("content-type", "").split(";")[0].strip().lower()
    if kind != "application/json":
        raise BadRequest("the content type must be application/json", None, "invalid_content_type")
    body = bytearray()
    try:
        async with asyncio.timeout(BODY_LIMIT_S):
            async for chunk in request.stream():
                body += chunk
                if len(body) > limit:
                    raise ApiError(413, f"the body is larger than {limit} bytes", None, "body_too_large")
    except TimeoutError as error:
        raise ApiError(408, f"the body did not arrive within {BODY_LIMIT_S:g} s", None, "timeout") from error
    except ClientDisconnect as error:
        raise ClientGone("the client closed the connection inside the body") from error
    return bytes(body)


async def until_disconnect(receive: Receive, work: Coroutine[Any, Any, T]) -> T:
    """The result of ``work``, which is cancelled as soon as the client goes. Raises ClientGone then.

    Waits for the disconnect message instead of asking now and then, so that work stops at once. The body must have
    been read.
    """
    task = asyncio.create_task(work)
    watcher = asyncio.create_task(_disconnected(receive))
    try:
        await asyncio.wait({task, watcher}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientGone("the client closed the connection")
        return task.result()
    finally:
        task.cancel()
        watcher.cancel()
        await asyncio.gather(task, watcher, return_exceptions=True)


async def _disconnected(receive: Callable[[], Awaitable[Message]]) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


def check_key(header: str | None, key: str) -> None:
    """Bearer authentication; every request passes when ``key`` is empty. Raises ApiError 401."""
    scheme, _, token = (header or "").partition(" ")
    given = token.strip() if scheme.lower() == "bearer" else ""
    if key and not hmac.compare_digest(given.encode("utf-8", "surrogateescape"), key.encode()):
        raise ApiError(401, "a valid API key is required: Authorization: Bearer KEY", None, "invalid_api_key")


class RequestIds:
    """ASGI middleware: echoes a well-formed ``x-request-id`` or makes one, on every response."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        given = Headers(scope=scope).get("x-request-id", "")
        request_id = given if REQUEST_ID.fullmatch(given) else uuid.uuid4().hex

        async def send_with_id(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message)["x-request-id"] = request_id
            await send(message)

        await self._app(scope, receive, send_with_id)
