"""The HTTP routes: each one parses, asks the Gateway and sends. Failures get OpenAI's error shape here."""

from collections.abc import AsyncGenerator
from typing import Any

from fastapi import APIRouter, Depends, FastAPI, Request
from fastapi.responses import JSONResponse, Response
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp

from services.gateway.answers import Answer
from services.gateway.choices import Piece
from services.gateway.errors import ApiError, as_api_error
from services.gateway.gateway import Gateway, collect
from services.gateway.protocol import (
    ChatRequest,
    CompletionRequest,
    DetokenizeRequest,
    TokenizeRequest,
    parse,
)
from services.gateway.requests import Job
from services.gateway.stream import EventStream, events, keep_alive
from services.gateway.web import ClientGone, RequestIds, check_key, read_json, until_disconnect
from shared.config import GatewayConfig, parse_bytes
from shared.errors import MoemeshError

CLIENT_CLOSED = 499
"""Nobody sees it but logs: the client had gone."""


def build_app(gateway: Gateway, config: GatewayConfig, version: str) -> ASGIApp:
    """The ASGI application. Raises ConfigError for an unusable setting."""
    app = FastAPI(title="moemesh", version=version, openapi_url=None, redirect_slashes=False)
    app.include_router(_api(gateway, config))
    app.include_router(_operations(gateway, version))
    _add_error_handlers(app, gateway)
    return RequestIds(app)


def _api(gateway: Gateway, config: GatewayConfig) -> APIRouter:
    """What users call; needs the API key when there is one."""
    limit = parse_bytes("--max-body", config.max_body)

    def authenticate(request: Request) -> None:
        check_key(request.headers.get("authorization"), config.api_key)

    api = APIRouter(dependencies=[Depends(authenticate)])

    @api.post("/v1/completions")
    async def completions(request: Request) -> Response:
        body = parse(CompletionRequest, await read_json(request, limit))
        return await _generate(gateway, request, *await gateway.completion(body))

    @api.post("/v1/chat/completions")
    async def chat_completions(request: Request) -> Response:
        body = parse(ChatRequest, await read_json(request, limit))
        return await _generate(gateway, request, *await gateway.chat(body))

    @api.post("/tokenize")
    async def tokenize(request: Request) -> dict[str, Any]:
        return await gateway.tokenize(parse(TokenizeRequest, await read_json(request, limit)))

    @api.post("/detokenize")
    async def detokenize(request: Request) -> dict[str, Any]:
        return gateway.detokenize(parse(DetokenizeRequest, await read_json(request, limit)))

    @api.get("/v1/models")
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [gateway.model_card()]}

    @api.get("/v1/models/{name:path}")
    async def model(name: str) -> dict[str, Any]:
        gateway.check_model(name)
        return gateway.model_card()

    return api


def _operations(gateway: Gateway, version: str) -> APIRouter:
    """What supervisors and dashboards call; open."""
    api = APIRouter()

    @api.get("/version")
    async def show_version() -> dict[str, str]:
        return {"version": version}

    @api.get("/health")
    async def health() -> dict[str, str]:
        return {"status": "alive"}

    @api.get("/ready")
    async def ready() -> dict[str, str]:
        gateway.check_ready()
        return {"status": "ready"}

    @api.get("/metrics")
    def metrics() -> Response:
        body, kind = gateway.telemetry.render()
        return Response(body, media_type=kind)

    return api


async def _generate(gateway: Gateway, request: Request, answer: Answer[Any], jobs: list[Job]) -> Response:
    """Run the jobs. The first piece is awaited before a stream's headers, so that early failures keep their status."""
    pieces = gateway.pieces(jobs, request.headers, f"POST {request.url.path}")
    if answer.request.stream:
        first = await until_disconnect(request.receive, anext(pieces))
        return EventStream(keep_alive(events(answer, first, pieces, gateway.metrics)))
    found = await until_disconnect(request.receive, _all(pieces))
    return JSONResponse(collect(answer, found))


async def _all(pieces: AsyncGenerator[Piece, None]) -> list[Piece]:
    return [piece async for piece in pieces]


def _add_error_handlers(app: FastAPI, gateway: Gateway) -> None:
    def send(error: ApiError) -> Response:
        gateway.metrics.error(error)
        return JSONResponse(error.body(), error.status, error.headers)

    async def deliberate(request: Request, error: Exception) -> Response:
        if isinstance(error, ClientGone) or not isinstance(error, MoemeshError):
            return Response(status_code=CLIENT_CLOSED)
        return send(as_api_error(error))

    async def routing(request: Request, error: Exception) -> Response:
        status = error.status_code if isinstance(error, HTTPException) else 500
        text = f"{request.method} {request.url.path}: " + (
            "no such path" if status == 404 else str(getattr(error, "detail", ""))
        )
        return send(ApiError(status, text))

    async def defect(request: Request, error: Exception) -> Response:
        return send(ApiError(500, "the server failed; its log has the reason", None, "internal"))

    app.add_exception_handler(MoemeshError, deliberate)
    app.add_exception_handler(HTTPException, routing)
    app.add_exception_handler(Exception, defect)
