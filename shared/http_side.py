"""The small HTTP side of every instance: /metrics for Prometheus, /health and /ready for supervisors.

Runs in threads of its own, so that it answers while the asyncio thread is busy. Serves no requests of users.
"""

import socket
import threading
from collections.abc import Callable, Iterable
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
    """Context manager; ``url`` is known once entered. ``ready`` is asked from other threads, so it must only read."""

    def __init__(self, host: str, port: int, ready: Callable[[], bool], registry: CollectorRegistry) -> None:
        self.url = ""
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
        status, text = self._status(path)
        start_response(status, [("Content-Type", "text/plain; charset=utf-8"), ("Content-Length", str(len(text)))])
        return [text]

    def _status(self, path: str) -> tuple[str, bytes]:
        if path == "/health":
            return "200 OK", b"alive\n"
        if path == "/ready":
            return ("200 OK", b"ready\n") if self._ready() else ("503 Service Unavailable", b"not ready\n")
        return "404 Not Found", b"try /metrics, /health or /ready\n"
