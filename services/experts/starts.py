"""Starts experts: a thread that copies weights into slots and does nothing else. What to start is decided elsewhere."""

import resource
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import IntEnum

from shared.kernels.weights import Weight
from shared.models.loader import Checkpoint
from shared.models.slots import Slots, tensors_of

Read = Callable[[Checkpoint, int, int], tuple[Weight, ...]]
"""(checkpoint, layer, expert) -> its weights, as far as possible views of the mapped files. Raises ModelError."""


@dataclass(frozen=True)
class Started:
    """What has become of a start."""

    layer: int
    """Checkpoint index."""
    expert: int
    slot: int
    weights: tuple[Weight, ...] = ()
    problem: str = ""
    """Why it failed; empty: it is in its slot."""
    warm: bool = True
    """The weights were in host memory."""
    nbytes: int = 0
    seconds: float = 0.0
    """Without the time that it waited for others."""


class When(IntEnum):
    """How soon an expert is needed; sooner ones go first."""

    NOW = 0
    """An exchange waits for it."""
    NEXT = 1
    """It is foreseen for the next layer."""
    LATER = 2


Job = tuple[int, int, int]
"""(layer, expert, slot)"""


@dataclass
class _Queue:
    """Who is next; guarded by the condition of ``Starts``."""

    jobs: tuple[deque[Job], ...] = field(default_factory=lambda: tuple(deque[Job]() for _ in When))

    def __bool__(self) -> bool:
        return any(self.jobs)

    def pop(self) -> Job:
        return next(jobs for jobs in self.jobs if jobs).popleft()

    def wanted_with(self, layer: int) -> bool:
        """Whether an exchange that waits for an expert of this layer waits for another one, too."""
        urgent = self.jobs[When.NOW]
        return bool(urgent) and urgent[0][0] == layer

    def urge(self, layer: int, expert: int) -> None:
        for jobs in self.jobs[1:]:
            for job in jobs:
                if job[:2] == (layer, expert):
                    jobs.remove(job)
                    self.jobs[When.NOW].append(job)
                    return


class Starts:
    """The thread, and both ends of its queues. ``ask``, ``urge`` and ``ended`` belong to the compute thread.

    Args:
        open_checkpoint: a checkpoint for this thread alone.
        read: where an expert's weights are.
        slots: where they go.
        wake: called when there is something in ``ended`` that an exchange waits for, once for several of a layer, or
            when all is done that was asked for.
    """

    def __init__(
        self, open_checkpoint: Callable[[], Checkpoint], read: Read, slots: Slots, wake: Callable[[], None]
    ) -> None:
        self._open, self._read, self._slots, self._wake = open_checkpoint, read, slots, wake
        self._checkpoint: Checkpoint | None = None
        self._known: dict[tuple[int, int], tuple[Weight, ...]] = {}
        """Views of experts in the open checkpoint: where they are in its files."""
        self._queue = _Queue()
        self._changed = threading.Condition()
        self._ended: deque[Started] = deque()
        self._awaited: set[tuple[int, int]] = set()
        """(layer, expert) that exchanges wait for; guarded by the condition."""
        self._stopped = False
        self._thread = threading.Thread(target=self._run, name="starts", daemon=True)
        self._thread.start()

    def ask(self, layer: int, expert: int, slot: int, when: When) -> None:
        """Start an expert in a slot that nobody reads."""
        with self._changed:
            self._queue.jobs[when].append((layer, expert, slot))
            if when is When.NOW:
                self._awaited.add((layer, expert))
            self._changed.notify()

    def urge(self, layer: int, expert: int) -> None:
        """An exchange waits for this one now."""
        with self._changed:
            self._awaited.add((layer, expert))
            self._queue.urge(layer, expert)

    def ended(self) -> list[Started]:
        """Those that have ended since the last call."""
        found = []
        while self._ended:
            found.append(self._ended.popleft())
        if found:
            with self._changed:
                self._awaited.difference_update((start.layer, start.expert) for start in found)
        return found

    def close(self) -> None:
        with self._changed:
            self._stopped = True
            self._changed.notify()
        self._thread.join()

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._queue or self._stopped)
                if self._stopped:
                    return
                job = self._queue.pop()
            self._ended.append(self._start(*job))
            with self._changed:
                more = self._queue.wanted_with(job[0]) if job[:2] in self._awaited else bool(self._queue)
            if not more:  # who is woken wants the core that starts the others
                self._wake()

    def _start(self, layer: int, expert: int, slot: int) -> Started:
        begun, blocks = time.monotonic(), _blocks_read()
        try:
            if self._checkpoint is None:
                self._checkpoint = self._open()
            self._checkpoint.check_files()
            weights = self._known.get((layer, expert)) or self._find(self._checkpoint, layer, expert)
            held = self._slots.fill(slot, weights, self._checkpoint.read)
        except Exception as error:  # noqa: BLE001 - whatever it is, who waits must hear of it
            self._checkpoint = None
            self._known.clear()
            return Started(layer, expert, slot, problem=str(error) or repr(error))
        size = sum(weight.nbytes for weight in weights)
        return Started(layer, expert, slot, held, "", _blocks_read() == blocks, size, time.monotonic() - begun)

    def _find(self, checkpoint: Checkpoint, layer: int, expert: int) -> tuple[Weight, ...]:
        """Views are kept; what had to be unpacked or rearranged is a copy, and too large for that."""
        weights = self._read(checkpoint, layer, expert)
        checkpoint.let_go()
        if all(map(checkpoint.is_view, tensors_of(weights))):
            self._known[layer, expert] = weights
        return weights


def _blocks_read() -> int:
    """Blocks that storage has read for this thread: none when everything was in the page cache."""
    return resource.getrusage(resource.RUSAGE_THREAD).ru_inblock
