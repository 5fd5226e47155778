"""A real mesh for tests: every service a process of its own, real NATS, real UCX.

``running_mesh`` is a context manager for synchronous tests; the mesh lives in an event loop on a thread of its own.
"""

import asyncio
import io
import re
import threading
from collections.abc import Callable, Coroutine, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, TypeVar

import httpx
from rich.console import Console

from shared.bus import Bus
from shared.cli.mesh import LocalMesh, MeshOptions
from shared.cli.scale import ask
from shared.cli.status import look
from shared.messages import Pool, Subjects
from shared.placement_watch import read_record
from shared.pool_messages import Scale

T = TypeVar("T")
START_LIMIT_S = 240.0
PLACED_LIMIT_S = 60.0
SCALED_LIMIT_S = 120.0


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

    def scale(self, pool: Pool, count: int, dry_run: bool = False, limit: float = SCALED_LIMIT_S) -> str:
        """``moemesh scale``: what a person sees once it is done, or at once without a limit. Raises NotScaled."""
        out = io.StringIO()
        request = Scale(pool=pool, count=count, dry_run=dry_run)
        limit = 0.0 if dry_run else limit
        self.call(ask(self.mesh.nats_url, self.mesh.options.mesh, request, Console(file=out, width=160), limit))
        return out.getvalue()

    def metrics_of(self, name: str) -> Callable[[str], float]:
        """Reads a metric of an instance; 0 for a metric or an instance that is not there yet."""
        members, _ = self.call(look(self.mesh.nats_url, self.mesh.options.mesh))
        url = next((m.heartbeat.url for m in members if m.id == name), "")

        def read(metric: str) -> float:
            if not url:
                return 0.0
            text = httpx.get(url + "/metrics", timeout=30).text
            found = re.search(rf"^{re.escape(metric)} (\S+)$", text, re.MULTILINE)
            return float(found[1]) if found else 0.0

        return read


def outputs(mesh: RunningMesh, bodies: Sequence[Mapping[str, Any]]) -> list[Any]:
    """Text, tokens and log-probabilities of completions that run at the same time."""
    with ThreadPoolExecutor(len(bodies)) as pool:
        answers = list(pool.map(lambda body: mesh.complete(ignore_eos=True, **body), bodies))
    return [answer["choices"] for answer in answers]


class SpreadMesh(LocalMesh):
    """A mesh whose processes pretend to be on several nodes; ``nodes``: by name of the process."""

    nodes: Mapping[str, str] = {}

    def _environ(self, name: str) -> dict[str, str]:
        node = {"MOEMESH_NODE": self.nodes[name]} if name in self.nodes else {}
        return super()._environ(name) | node


async def until_all_have_homes(mesh: LocalMesh) -> None:
    """A mesh is ready with the first expert instance; tests that speak of several mean all that they asked for."""
    bus = await Bus.connect(mesh.nats_url, "test")
    try:
        store = await bus.store(Subjects(mesh.options.mesh).bucket)
        while mesh.options.experts:
            record, _ = await read_record(store)
            if record and record.committed and len(record.committed.instances) == mesh.options.experts:
                return
            await asyncio.sleep(0.02)
    finally:
        await bus.close()


@contextmanager
def running_mesh(nodes: Mapping[str, str] | None = None, **options: Any) -> Iterator[RunningMesh]:
    """Start a mesh on free ports and stop it at the end; a failed start raises with the child's last lines."""
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, daemon=True)
    thread.start()
    log: list[str] = []
    mesh = SpreadMesh(MeshOptions(port=0, **options), on_line=lambda name, line: log.append(f"{name}: {line}"))
    mesh.nodes = nodes or {}
    running = RunningMesh(mesh, loop, log)
    try:
        running.call(mesh.__aenter__())
        running.call(until_all_have_homes(mesh), PLACED_LIMIT_S)
        yield running
    finally:
        running.call(mesh.stop())
        loop.call_soon_threadsafe(loop.stop)
        thread.join(10)
        loop.close()
        print("\n".join(log[-80:]))
