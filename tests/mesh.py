"""A real mesh for tests: every service a process of its own, real NATS, real UCX.

``running_mesh`` is a context manager for synchronous tests; the mesh lives in an event loop on a thread of its own.
"""

import asyncio
import threading
from collections.abc import Coroutine, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, TypeVar

import httpx

from shared.cli.mesh import LocalMesh, MeshOptions

T = TypeVar("T")
START_LIMIT_S = 240.0


@dataclass
class RunningMesh:
    """Handle on a started mesh: its URL, its processes, and a way to run coroutines in its loop."""

    mesh: LocalMesh
    loop: asyncio.AbstractEventLoop
    log: list[str] = field(default_factory=list)

    @property
    def url(self) -> str:
        return self.mesh.url

    def call(self, coroutine: Coroutine[Any, Any, T], limit: float = START_LIMIT_S) -> T:
        return asyncio.run_coroutine_threadsafe(coroutine, self.loop).result(limit)

    def kill(self, name: str) -> int:
        """kill -9 one process; returns its old pid."""
        process = self.mesh.children[name].process
        assert process is not None
        process.kill()
        return process.pid

    def complete(self, **body: Any) -> dict[str, Any]:
        """POST /v1/completions; raises with the body's text on anything but 200."""
        response = httpx.post(self.url + "/v1/completions", json=body, timeout=120)
        assert response.status_code == 200, response.text
        return response.json()


@contextmanager
def running_mesh(**options: Any) -> Iterator[RunningMesh]:
    """Start a mesh on free ports and stop it at the end; a failed start raises with the child's last lines."""
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, daemon=True)
    thread.start()
    log: list[str] = []
    mesh = LocalMesh(MeshOptions(port=0, **options), on_line=lambda name, line: log.append(f"{name}: {line}"))
    running = RunningMesh(mesh, loop, log)
    try:
        running.call(mesh.__aenter__())
        yield running
    finally:
        running.call(mesh.stop())
        loop.call_soon_threadsafe(loop.stop)
        thread.join(10)
        loop.close()
        print("\n".join(log[-80:]))
