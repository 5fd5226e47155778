"""Child processes of ``moemesh up``: start, watch, keep their last words, restart, stop.

Knows processes only; what a mesh consists of is in mesh.py.
"""

import asyncio
import os
import sys
from asyncio.subprocess import DEVNULL, PIPE, Process
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from shared.errors import MoemeshError
from shared.priority import yield_to_others

LAST_LINES = 15
RESTART_WAIT_S = 0.5
RESTART_WAIT_MAX_S = 10.0


class ChildDied(MoemeshError):
    """A service process ended while the mesh was starting; carries its last error lines."""

    def __init__(self, name: str, status: int, lines: list[str]) -> None:
        text = "\n".join(f"  {line}" for line in lines) or "  (it printed nothing)"
        super().__init__(f"{name} ended with status {status} while starting; its last lines:\n{text}")
        self.name = name
        self.status = status
        self.lines = lines


@dataclass
class Child:
    """One service process and its restarts.

    ``argv`` is what follows the interpreter; ``environ`` replaces the whole environment.
    """

    name: str
    argv: list[str]
    environ: Mapping[str, str]
    on_line: Callable[[str, str], None]
    """Called with (name, line) for every line of the child's stderr."""
    niceness: int = 0
    lines: deque[str] = field(default_factory=lambda: deque(maxlen=LAST_LINES))
    process: Process | None = None
    restarts: int = 0
    _task: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Start the process and read its stderr until it ends."""
        self.process = await asyncio.create_subprocess_exec(
            sys.executable,
            *self.argv,
            stdin=DEVNULL,
            stdout=DEVNULL,
            stderr=PIPE,
            env=dict(self.environ),
            process_group=0,  # not a session: priorities count only among processes of one session
        )
        if self.niceness:
            yield_to_others(self.process.pid, self.niceness)
        self._task = asyncio.create_task(self._read(self.process))

    async def _read(self, process: Process) -> None:
        assert process.stderr is not None
        while True:
            try:
                raw = await process.stderr.readline()
            except ValueError:  # what there was of a line beyond the reader's limit is dropped
                raw = b"(a line too long to show)\n"
            if not raw:
                return
            line = raw.decode(errors="replace").rstrip()
            self.lines.append(line)
            self.on_line(self.name, line)

    async def wait(self) -> int:
        """Exit status of the current process, after its last line was read."""
        assert self.process is not None
        assert self._task is not None
        status = await self.process.wait()
        await asyncio.wait([self._task], timeout=1.0)
        return status

    async def keep_alive(self) -> None:
        """Restart the process for ever when it ends, with rising waits while it keeps dying early."""
        pause = RESTART_WAIT_S
        while True:
            begun = asyncio.get_running_loop().time()
            status = await self.wait()
            lived = asyncio.get_running_loop().time() - begun
            pause = RESTART_WAIT_S if lived > RESTART_WAIT_MAX_S else min(pause * 2, RESTART_WAIT_MAX_S)
            self.on_line(self.name, f"ended with status {status}; starting it again in {pause:.1f} s")
            await asyncio.sleep(pause)
            self.restarts += 1
            await self.start()

    async def stop(self, grace_s: float) -> None:
        """SIGTERM, then SIGKILL after ``grace_s`` seconds; no-op when it is not running."""
        if self.process is None or self.process.returncode is not None:
            return
        self.process.terminate()
        try:
            await asyncio.wait_for(self.wait(), grace_s)
        except TimeoutError:
            self.on_line(self.name, f"did not stop within {grace_s:.0f} s; killed")
            self.process.kill()
            await self.wait()


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
