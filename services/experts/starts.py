"""Starts experts: a thread that copies weights into slots and does nothing else. What to start is decided elsewhere."""

import resource
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable
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
        ahead: (layer, expert) of those that are looked up while nothing is asked for: a first start takes several times
            as long as later ones.
    """

    def __init__(
        self,
        open_checkpoint: Callable[[], Checkpoint],
        read: Read,
        slots: Slots,
        wake: Callable[[], None],
        ahead: Iterable[tuple[int, int]] = (),
    ) -> None:
        self._open, self._read, self._slots, self._wake = open_checkpoint, read, slots, wake
        self._checkpoint: Checkpoint | None = None
        self._known: dict[tuple[int, int], tuple[Weight, ...]] = {}
        """Views of experts in the open checkpoint: where they are in its files."""
        self._ahead = list(ahead)[::-1]
        self._queue = _Queue()
        self._changed = threading.Condition()
        self._ended: deque[Started] = deque()
        self._awaited: set[tuple[int, int]] = set()
        """(layer, expert) that exchanges wait for; guarded by the condition."""
        self._wake_next = False
        """An exchange waits for a slot; guarded by the condition."""
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

    def urge_any(self) -> None:
        """An exchange waits for a slot: whoever is started next may have to make room."""
        with self._changed:
            self._wake_next = True

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
                self._changed.wait_for(lambda: self._queue or self._stopped or self._ahead)
                if self._stopped:
                    return
                job = self._queue.pop() if self._queue else None
            if job is None:
                self._look_ahead()
                continue
            self._ended.append(self._start(*job))
            with self._changed:
                wake = self._wanted(job)
            if wake:
                self._wake()

    def _wanted(self, job: Job) -> bool:
        """Whether to wake after this one: not for each of many, for who is woken wants the core that starts them."""
        if self._wake_next:
            self._wake_next = False
            return True
        layer, expert, _ = job
        return not (self._queue.wanted_with(layer) if (layer, expert) in self._awaited else self._queue)

    def _start(self, layer: int, expert: int, slot: int) -> Started:
        begun, blocks = time.monotonic(), _blocks_read()
        try:
            checkpoint = self._opened()
            checkpoint.check_files()
            weights = self._find(checkpoint, layer, expert)
            held = self._slots.fill(slot, weights, checkpoint.read)
        except Exception as error:  # noqa: BLE001 - whatever it is, who waits must hear of it
            self._checkpoint = None
            self._known.clear()
            return Started(layer, expert, slot, problem=str(error) or repr(error))
        size = sum(weight.nbytes for weight in weights)
        return Started(layer, expert, slot, held, "", _blocks_read() == blocks, size, time.monotonic() - begun)

    def _look_ahead(self) -> None:
        name = self._ahead.pop()
        try:
            checkpoint = self._opened()
            checkpoint.check_files()
            self._find(checkpoint, *name)
        except Exception:  # noqa: BLE001 - whatever it is, who starts this expert will hear of it
            self._ahead.clear()
        if name not in self._known:
            self._ahead.clear()

    def _opened(self) -> Checkpoint:
        if self._checkpoint is None:
            self._checkpoint = self._open()
        return self._checkpoint

    def _find(self, checkpoint: Checkpoint, layer: int, expert: int) -> tuple[Weight, ...]:
        """Views are kept; what had to be unpacked or rearranged is a copy, and too large for that."""
        if (layer, expert) in self._known:
            return self._known[layer, expert]
        weights = self._read(checkpoint, layer, expert)
        if all(map(checkpoint.is_view, tensors_of(weights))):
            self._known[layer, expert] = weights
            checkpoint.let_go()
        return weights


def _blocks_read() -> int:
    """Blocks that storage has read for this thread: none when everything was in the page cache."""
    return resource.getrusage(resource.RUSAGE_THREAD).ru_inblock
