"""Records the routing of a live mesh into a trace file of our own.

Attention instances send while they are asked to (wire.py); what they send goes through the checks of a reader before it
is written. Steps get small numbers; instances that run a step together give it the same one. Used by `moemesh trace
record` and by benches.
"""

import asyncio
import io
import secrets
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

from shared.bus import Bus
from shared.errors import MoemeshError
from shared.membership import Members
from shared.messages import Kind, ModelFacts, Subjects
from shared.traces.native import Header, TraceWriter, read_records
from shared.traces.wire import RoutingTrace, TraceLease, leases, routing

LEASE_S = 3.0
RENEW_S = 1.0
FIND_S, ANSWER_S, FINISH_S = 3.0, 5.0, 2.0
"""How long we wait for somebody to be there, for the first answer, and for the last records."""
MOST_STEPS = 10_000
"""Steps whose numbers are remembered: members of a group send within a fraction of a second."""
MOST_QUEUED = 256
"""Messages that wait to be written; more are lost, and counted as such."""


@dataclass(frozen=True)
class Limits:
    """When to stop; 0: not for this reason."""

    seconds: float = 0.0
    rows: int = 0
    """In every layer; whole exchanges, so that it may be a few more."""


class CannotRecord(MoemeshError):
    """There is nobody to record from, or nowhere to write."""


@dataclass
class _Source:
    """One attention instance, as far as it is recorded."""

    base: int
    """Exchanges that it had seen before ours."""
    seen: int = 0
    received: int = 0
    started: bool = False
    """It has had a lease of ours."""

    @property
    def lost(self) -> int:
        return self.seen - self.base - self.received


@dataclass
class Recorder:
    """From messages to the file. ``recorder``: our name in leases."""

    writer: TraceWriter
    header: Header
    recorder: str
    exchanges: int = 0
    pauses: int = 0
    """Times that an instance had stopped recording, because our leases did not reach it."""
    steps: int = 0
    numbers: dict[int, int] = field(default_factory=dict)
    """Of the latest steps in the file, by what they were sent as."""
    rows_of: Counter[int] = field(default_factory=Counter)
    """By layer."""
    sources: dict[tuple[str, int], _Source] = field(default_factory=dict)
    ended: set[tuple[str, int]] = field(default_factory=set)
    """Those whose records are complete."""

    @property
    def rows(self) -> int:
        """Tokens recorded in every layer."""
        return min(self.rows_of[layer] for layer in self.header.layers)

    @property
    def lost(self) -> int:
        """Exchanges that did not come, because an instance had too many of them or a message was lost."""
        return sum(source.lost for source in self.sources.values())

    @property
    def complete(self) -> bool:
        return self.ended >= self.sources.keys()

    def take(self, message: RoutingTrace) -> None:
        """Raises BadTrace for records that no reader would take, OSError when they cannot be written."""
        key = message.attention, message.incarnation
        where, records = Path(f"what {message.attention} sent"), io.BytesIO(message.records)
        exchanges = list(read_records(where, self.header, records, len(message.records)))
        source = self.sources.setdefault(key, _Source(message.seen - len(exchanges)))
        if message.started == self.recorder:
            self.pauses += source.started
            source.started = True
        for exchange in exchanges:
            self.writer.append(exchange.layer, self._number(exchange.step), exchange.ids)
            self.rows_of[exchange.layer] += len(exchange.ids)
        self.writer.flush()
        source.received += len(exchanges)
        source.seen = max(source.seen, message.seen)
        self.exchanges += len(exchanges)
        if self.recorder in message.ended:
            self.ended.add(key)

    def _number(self, step: int) -> int:
        if step not in self.numbers:
            if len(self.numbers) == MOST_STEPS:
                del self.numbers[next(iter(self.numbers))]
            self.numbers[step], self.steps = self.steps, self.steps + 1
        return self.numbers[step]


async def record(
    nats: str,
    mesh: str,
    out: Path,
    stop: asyncio.Event,
    limits: Limits,
    progress: Callable[[Recorder], None] = lambda recorder: None,
) -> Recorder:
    """Record until ``stop`` is set or a limit is reached.

    Args:
        nats: URL of the server.
        out: a new file.
        progress: called every second and at the end.

    Raises CannotRecord, BusUnavailable, BadTrace. What has come until then is in the file, which is whole.
    """
    bus = await Bus.connect(nats, "moemesh-trace")
    try:
        model = await find_model(bus, mesh)
        header = Header(model.name, model.digest, model.experts, model.moe_layers)
        with _new_trace(out, header) as writer:
            recorder = Recorder(writer, header, secrets.token_hex(8))
            await _Session(bus, Subjects(mesh), recorder, progress).run(stop, limits)
        return recorder
    except OSError as error:
        raise CannotRecord(f"{out}: {error.strerror or error}") from error
    finally:
        await bus.close()


@contextmanager
def _new_trace(out: Path, header: Header) -> Iterator[TraceWriter]:
    """A file that is there afterwards only if there was anybody to record from."""
    with TraceWriter(out, header) as writer:
        try:
            yield writer
        except CannotRecord:
            out.unlink()
            raise


async def find_model(bus: Bus, mesh: str) -> ModelFacts:
    """What the attention instances of a mesh serve. Raises CannotRecord when none has exchanges."""
    members, found = Members(mesh), asyncio.Event()
    members.on_change(lambda: found.set() if members.ready(Kind.ATTENTION) else None)
    await members.watch(bus)
    with suppress(TimeoutError):
        await asyncio.wait_for(found.wait(), FIND_S)
    beats = [member.heartbeat for member in members.ready(Kind.ATTENTION)]
    if not beats:
        raise CannotRecord(f"no attention instance of mesh {mesh!r} answers on {bus.url}; is it up? (moemesh up)")
    for beat in beats:
        if beat.model and beat.attention and not beat.attention.monolith:
            return beat.model
    raise CannotRecord("monoliths hold every expert themselves: there are no exchanges to record")


class _Session:
    """Asks for routing, again and again, and gives what comes to the recorder."""

    def __init__(self, bus: Bus, subjects: Subjects, recorder: Recorder, progress: Callable[[Recorder], None]) -> None:
        self._bus, self._subjects, self._recorder, self._progress = bus, subjects, recorder, progress
        self._queue: asyncio.Queue[RoutingTrace] = asyncio.Queue(MOST_QUEUED)

    async def run(self, stop: asyncio.Event, limits: Limits) -> None:
        await self._bus.subscribe(routing(self._subjects), RoutingTrace, self._keep, ordered=True)
        asking = asyncio.create_task(self._keep_asking())
        stopped = asyncio.create_task(stop.wait())
        try:
            await self._begin(stopped)
            if limits.seconds:
                asyncio.get_running_loop().call_later(limits.seconds, stop.set)
            while not stopped.done() and not 0 < limits.rows <= self._recorder.rows:
                await self._take_next(stopped, RENEW_S)
        finally:
            asking.cancel()
            stopped.cancel()
        await self._finish()
        self._progress(self._recorder)

    def _keep(self, message: RoutingTrace) -> None:
        with suppress(asyncio.QueueFull):
            self._queue.put_nowait(message)

    async def _keep_asking(self) -> None:
        while True:
            await self._ask(LEASE_S)
            self._progress(self._recorder)
            await asyncio.sleep(RENEW_S)

    async def _ask(self, seconds: float) -> None:
        lease = TraceLease(recorder=self._recorder.recorder, seconds=seconds)
        await self._bus.publish(leases(self._subjects), lease)

    async def _begin(self, stopped: asyncio.Task[bool]) -> None:
        """Until the first instance has answered."""
        await self._take_next(stopped, ANSWER_S)
        if not self._recorder.sources and not stopped.done():
            raise CannotRecord(f"no attention instance has answered within {ANSWER_S:g} s")

    async def _take_next(self, stopped: asyncio.Task[bool], limit: float) -> None:
        """One message, unless ``stopped`` is done or ``limit`` seconds have passed before it comes."""
        message = asyncio.create_task(self._queue.get())
        await asyncio.wait({message, stopped}, timeout=limit, return_when=asyncio.FIRST_COMPLETED)
        if message.done():
            self._recorder.take(message.result())
        else:
            message.cancel()

    async def _finish(self) -> None:
        """Take what is on its way; an instance that is gone keeps us for a moment only."""
        self._recorder.ended.clear()
        await self._ask(0)
        with suppress(TimeoutError):
            async with asyncio.timeout(FINISH_S):
                while not self._recorder.complete:
                    self._recorder.take(await self._queue.get())
