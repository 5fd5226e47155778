"""The small HTTP side of every instance: /metrics for Prometheus, /health and /ready for supervisors, JSON for others.

Runs in threads of its own, so that it answers while the asyncio thread is busy. Serves no requests of users.
"""

import json
import socket
import threading
from collections.abc import Callable, Iterable, Mapping
from socketserver import TCPServer, ThreadingMixIn
from types import TracebackType
from typing import Any, Self
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer

from prometheus_client import CollectorRegistry, make_wsgi_app

from shared.errors import ConfigError

STOP_POLL_S = 0.5
"""How often its thread looks whether it should end; each time takes 0.1 ms of a core."""
ANY_ADDRESS = ("", "0.0.0.0", "::")
WsgiApp = Callable[[dict[str, Any], Callable[..., Any]], Iterable[bytes]]
Page = Callable[[], Mapping[str, Any] | None]
"""What a JSON page says now; None: not known yet."""


class _Handler(WSGIRequestHandler):
    timeout = 5.0  # seconds: a client that sends nothing does not hold a thread

    def log_message(self, format: str, *args: Any) -> None:
        """Probes every few seconds are no news."""


class _Server(ThreadingMixIn, WSGIServer):
    daemon_threads = True

    def server_bind(self) -> None:
        """As in WSGIServer, without the reverse name lookup that can take seconds."""
        TCPServer.server_bind(self)
        host, self.server_port = self.server_address[:2]
        self.server_name = str(host)
        self.setup_environ()


class HttpSide:
    """Context manager; ``url`` is known once entered.

    ``ready`` and ``pages`` (path -> what it says; may grow) are asked from other threads, so they must only read.
    """

    def __init__(
        self,
        host: str,
        port: int,
        ready: Callable[[], bool],
        registry: CollectorRegistry,
        pages: Mapping[str, Page] | None = None,
    ) -> None:
        self.url = ""
        self._pages = {} if pages is None else pages
        self._address = (host, port)
        self._ready = ready
        self._metrics: WsgiApp = make_wsgi_app(registry)

    def __enter__(self) -> Self:
        """Raises ConfigError when the address cannot be used."""
        host, port = self._address
        try:
            kind = type("Server", (_Server,), {"address_family": socket.AF_INET6 if ":" in host else socket.AF_INET})
            self._server = kind(self._address, _Handler)
        except (OSError, OverflowError) as error:
            raise ConfigError("--metrics-host, --metrics-port", f"cannot listen on {host}:{port}: {error}") from error
        self._server.set_app(self._answer)
        name = socket.gethostname() if host in ANY_ADDRESS else f"[{host}]" if ":" in host else host
        self.url = f"http://{name}:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, args=(STOP_POLL_S,), name="http-side", daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._server.shutdown()
        self._server.server_close()

    def _answer(self, environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
        path = environ.get("PATH_INFO", "")
        if path == "/metrics":
            return self._metrics(environ, start_response)
        page = self._pages.get(path)
        content = "text/plain; charset=utf-8" if page is None else "application/json"
        status, text = self._status(path) if page is None else _shown(page())
        start_response(status, [("Content-Type", content), ("Content-Length", str(len(text)))])
        return [text]

    def _status(self, path: str) -> tuple[str, bytes]:
        if path == "/health":
            return "200 OK", b"alive\n"
        if path == "/ready":
            return ("200 OK", b"ready\n") if self._ready() else ("503 Service Unavailable", b"not ready\n")
        others = "".join(f", {page}" for page in sorted(self._pages))
        return "404 Not Found", f"try /metrics, /health{others} or /ready\n".encode()


def _shown(values: Mapping[str, Any] | None) -> tuple[str, bytes]:
    if values is None:
        return "503 Service Unavailable", b'{"error": "not known yet"}\n'
    return "200 OK", json.dumps(values).encode() + b"\n"
