"""Starts experts: a thread that copies weights into slots and does nothing else. What to start is decided elsewhere."""

import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

from shared.errors import MoemeshError
from shared.kernels.weights import Weight
from shared.models.loader import Checkpoint
from shared.models.slots import Slots, in_host_memory, let_go, read_ahead, tensors_of

IDLE_S = 5.0
"""After so long without a start the checkpoint is closed, and what was mapped of it."""

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


@dataclass
class _Queue:
    """Who is next; guarded by the condition of ``Starts``."""

    urgent: deque[tuple[int, int, int]] = field(default_factory=deque)
    """(layer, expert, slot) that an exchange waits for."""
    ahead: deque[tuple[int, int, int]] = field(default_factory=deque)

    def __bool__(self) -> bool:
        return bool(self.urgent or self.ahead)

    def pop(self) -> tuple[int, int, int]:
        return (self.urgent or self.ahead).popleft()


class Starts:
    """The thread, and both ends of its queues. ``ask``, ``urge`` and ``ended`` belong to the compute thread.

    Args:
        open_checkpoint: a checkpoint for this thread alone.
        read: where an expert's weights are.
        slots: where they go.
        wake: called after each start.
    """

    def __init__(
        self, open_checkpoint: Callable[[], Checkpoint], read: Read, slots: Slots, wake: Callable[[], None]
    ) -> None:
        self._open, self._read, self._slots, self._wake = open_checkpoint, read, slots, wake
        self._checkpoint: Checkpoint | None = None
        self._queue = _Queue()
        self._changed = threading.Condition()
        self._ended: deque[Started] = deque()
        self._stopped = False
        self._thread = threading.Thread(target=self._run, name="starts", daemon=True)
        self._thread.start()

    def ask(self, layer: int, expert: int, slot: int, urgent: bool) -> None:
        """Start an expert in a slot that nobody reads."""
        with self._changed:
            (self._queue.urgent if urgent else self._queue.ahead).append((layer, expert, slot))
            self._changed.notify()

    def urge(self, layer: int, expert: int) -> None:
        """An exchange waits for this one now; nothing happens if it is being started already."""
        with self._changed:
            for job in self._queue.ahead:
                if job[:2] == (layer, expert):
                    self._queue.ahead.remove(job)
                    self._queue.urgent.append(job)
                    return

    def ended(self) -> list[Started]:
        """Those that have ended since the last call."""
        found = []
        while self._ended:
            found.append(self._ended.popleft())
        return found

    def close(self) -> None:
        with self._changed:
            self._stopped = True
            self._changed.notify()
        self._thread.join()

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._queue or self._stopped, IDLE_S)
                if self._stopped:
                    return
                job = self._queue.pop() if self._queue else None
            if job:
                self._ended.append(self._start(*job))
                self._wake()
            else:
                self._checkpoint = None

    def _start(self, layer: int, expert: int, slot: int) -> Started:
        begun = time.monotonic()
        try:
            if self._checkpoint is None:
                self._checkpoint = self._open()
            weights = self._read(self._checkpoint, layer, expert)
            mapped = tensors_of(weights)
            warm = in_host_memory(mapped)
            if not warm:
                read_ahead(mapped)
            held = self._slots.fill(slot, weights)
            let_go(mapped)
        except (MoemeshError, OSError, RuntimeError) as error:  # RuntimeError: torch, about a file that has changed
            self._checkpoint = None
            return Started(layer, expert, slot, problem=str(error))
        size, seconds = sum(tensor.nbytes for tensor in mapped), time.monotonic() - begun
        return Started(layer, expert, slot, held, warm=warm, nbytes=size, seconds=seconds)
