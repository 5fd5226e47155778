"""Recorded exchanges with an HTTP API, played back in order."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import httpx


@dataclass
class Exchange:
    """A request that must come, and its answer. ``body``: of the request, as JSON; None: whatever it is."""

    method: str
    path: str
    answer: Any = None
    status: int = 200
    query: Mapping[str, str] = field(default_factory=dict)
    body: Mapping[str, Any] | None = None
    headers: Mapping[str, str] = field(default_factory=dict)


class Recorded:
    """``transport`` answers as recorded; a request that was not recorded, or not then, fails the test."""

    def __init__(self, exchanges: Sequence[Exchange], any_order: bool = False) -> None:
        self.left = list(exchanges)
        self.requests: list[httpx.Request] = []
        self.transport = httpx.MockTransport(self._answer)
        self._any_order = any_order

    def _answer(self, request: httpx.Request) -> httpx.Response:
        asked = (request.method, request.url.path)
        fits = [e for e in self.left if (e.method, e.path) == asked and dict(request.url.params) == dict(e.query)]
        assert fits, f"not recorded: {asked} {request.url.params}"
        assert self._any_order or fits[0] is self.left[0], f"{asked} before {self.left[0]}"
        self.left.remove(fits[0])
        self.requests.append(request)
        if fits[0].body is not None:
            assert json.loads(request.content) == fits[0].body
        assert all(request.headers[name] == value for name, value in fits[0].headers.items())
        answer = fits[0].answer
        return httpx.Response(fits[0].status) if answer is None else httpx.Response(fits[0].status, json=answer)
