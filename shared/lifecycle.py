"""The life of every service: STARTING -> READY -> DRAINING -> GONE, as one async context manager.

Covers identity, the bus connection, membership, heartbeats, the HTTP side, signals and exit status. What a service does
between ``ready`` and ``until_stopped`` is its own.
"""

import asyncio
import logging
import os
import re
import secrets
import signal
import sys
import traceback
from collections.abc import Callable, Coroutine, Iterator, Mapping
from contextlib import AsyncExitStack
from importlib import metadata
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from shared.bus import Bus
from shared.config import MeshConfig
from shared.errors import BusUnavailable, ConfigError, MoemeshError
from shared.http_side import HttpSide, Page
from shared.membership import HEARTBEAT_S, Members
from shared.messages import Heartbeat, Hello, Kind, ModelFacts, State
from shared.metrics import Sample, sample
from shared.one_model import check_model, stay_with
from shared.telemetry import Telemetry

CONNECT_LIMIT_S = 30.0
HELLO_WAIT_S = 0.3
"""How long a newcomer listens before it speaks: long enough for the others to answer its Hello."""
NAME = re.compile(r"[A-Za-z0-9_-]{1,64}")
LOG_LEVELS = ("DEBUG", "INFO", "WARNING", "ERROR")
Facts = Callable[[], Mapping[str, Any]]


class Stopped(MoemeshError):
    """The service was told to stop before it was READY; no failure."""


def checked_name(setting: str, name: str) -> str:
    """A name that may be part of a NATS subject. Raises ConfigError."""
    if not NAME.fullmatch(name):
        raise ConfigError(setting, f"{name!r} must be 1 to 64 letters, digits, - or _")
    return name


def node_name(configured: str) -> str:
    """This host in the mesh: the configured name, else the boot id, which all containers of a host share."""
    return configured or Path("/proc/sys/kernel/random/boot_id").read_text().strip()


class Instance:
    """One running service. Entering connects and announces it; leaving says GONE.

    ``signals=False`` leaves SIGTERM and SIGINT alone, for several instances in one process.
    """

    bus: Bus

    def __init__(self, kind: Kind, config: MeshConfig, signals: bool = True) -> None:
        self.kind = kind
        self.mesh = checked_name("--mesh", config.mesh)
        self.id = checked_name("--id", config.id or f"{kind.value}-{secrets.token_hex(3)}")
        self.incarnation = secrets.randbits(64)
        self._version = _version()  # reads files
        self.node = node_name(config.node)
        self.state = State.STARTING
        self.members = Members(self.mesh, self.id)
        self.subjects = self.members.subjects
        self.telemetry = Telemetry(
            kind.value,
            self.id,
            self.mesh,
            endpoint=config.otlp_endpoint,
            ratio=config.trace_ratio,
            trace_layers=config.trace_layers,
        )
        """Traces, and the metrics that the HTTP side shows."""
        self.pages: dict[str, Page] = {}
        """JSON pages of the HTTP side, by path; asked in other threads."""
        self.model: ModelFacts | None = None
        self._config = config
        self._signals = signals
        self._detail = ""
        self._facts: Facts = dict
        self._stopping = asyncio.Event()
        self._error: BaseException | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        self._stack = AsyncExitStack()

    async def __aenter__(self) -> Self:
        """Raises ConfigError (address in use, id taken) and BusUnavailable."""
        self._loop = asyncio.get_running_loop()
        self._main = asyncio.current_task()
        try:
            await self._start()
        except BaseException as error:
            await self.__aexit__(type(error), error, None)
            raise
        return self

    async def _start(self) -> None:
        if self._signals:
            for number in (signal.SIGTERM, signal.SIGINT):
                self._loop.add_signal_handler(number, self._on_signal, number)
                self._stack.callback(self._loop.remove_signal_handler, number)
        config = self._config
        self._stack.push_async_callback(asyncio.to_thread, self.telemetry.shutdown)
        registry = self.telemetry.registry
        host, port = config.metrics_host, config.metrics_port
        side = HttpSide(host, port, lambda: self.state is State.READY, registry, self.pages)
        self.url = self._stack.enter_context(side).url
        self.bus = await Bus.connect(config.nats, self.id, CONNECT_LIMIT_S)
        self._stack.push_async_callback(self.bus.close)
        self.telemetry.collect(self._bus_samples)
        await self.members.watch(self.bus)
        await asyncio.sleep(HELLO_WAIT_S)
        if taken := self.members.get(self.id):
            raise ConfigError("--id", f"{self.id} is running already, on node {taken.heartbeat.node}")
        self._stack.push_async_callback(self._say_goodbye)
        await self.bus.subscribe(self.subjects.hello, Hello, self._on_hello)
        self.spawn(self._keep_beating(), "heartbeats")

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Says GONE and closes everything. Raises the error given to ``fail``, and Stopped after an early signal."""
        if error is not None and not isinstance(error, asyncio.CancelledError):
            self._detail = str(error)
        for task in self._tasks:
            task.cancel()
        await self._stack.aclose()
        if isinstance(error, asyncio.CancelledError):
            if self._error is not None:
                raise self._error from None
            if self._stopping.is_set():
                raise Stopped("stopped before it was ready") from None

    # ---- what a service calls -----------------------------------------------------------------------------

    async def say(self, detail: str) -> None:
        """One line for a person about what goes on, e.g. loading progress."""
        self._detail = detail
        await self.announce()

    async def join(self, model: ModelFacts) -> None:
        """Announce the model that is served here. Raises ModelError when the mesh serves another, BusUnavailable."""
        self.model = model
        await check_model(model, False, self.members, self.bus)
        await self.announce()

    async def ready(self, facts: Facts) -> None:
        """Become READY. ``facts()`` gives more Heartbeat fields (experts=..., url=...) and is asked at every heartbeat.

        Raises ModelError when the mesh has come to serve another model meanwhile, BusUnavailable.
        """
        if self.model:
            await check_model(self.model, False, self.members, self.bus)
            self.spawn(stay_with(self.model, self.members, self.bus), "one-model")
        self._facts = facts
        self._detail = ""
        if self.state is State.STARTING:
            self.state = State.READY
        await self.announce()

    async def announce(self) -> None:
        """Send a heartbeat now, because the facts have changed."""
        await self.bus.publish(self.subjects.heartbeat(self.kind, self.id), self.heartbeat())

    async def until_stopped(self) -> None:
        """Returns at SIGTERM, SIGINT or ``stop``; the state is DRAINING then."""
        await self._stopping.wait()
        await self.announce()

    def stop(self) -> None:
        """What a first SIGTERM does: DRAINING when READY; an instance that is still starting is cancelled."""
        was_ready = self.state is State.READY
        self.state = State.DRAINING
        self._stopping.set()
        if not was_ready and self._main is not None:
            self._main.cancel()

    def fail(self, error: BaseException) -> None:
        """Stop the process with ``error``: cancels the service. From any thread, e.g. a compute thread that dies."""
        self._loop.call_soon_threadsafe(self._fail, error)

    def spawn(self, work: Coroutine[Any, Any, None], name: str) -> asyncio.Task[None]:
        """A background task for the life of this instance, whose failure is the instance's failure."""
        task = asyncio.create_task(work, name=name)
        self._tasks.add(task)
        task.add_done_callback(self._spawned)
        return task

    # ---- heartbeats and the end ---------------------------------------------------------------------------

    def heartbeat(self) -> Heartbeat:
        """What this instance says of itself now."""
        fields = {"url": self.url, "detail": self._detail, "model": self.model, "version": self._version}
        identity = {"kind": self.kind, "id": self.id, "incarnation": self.incarnation, "node": self.node}
        return Heartbeat.model_validate({**fields, **self._facts(), **identity, "state": self.state})

    async def _keep_beating(self) -> None:
        while not self.bus.closed:
            await self.announce()
            await asyncio.sleep(HEARTBEAT_S)
        raise BusUnavailable(self._config.nats, "the NATS server refuses this client for good")

    async def _on_hello(self, hello: Hello) -> None:
        await self.announce()

    async def _say_goodbye(self) -> None:
        self.state = State.GONE
        self._facts = dict
        await self.announce()

    def _bus_samples(self) -> Iterator[Sample]:
        """For /metrics; read in another thread."""
        yield sample("bus_connected", self.bus.connected)
        yield sample("bus_reconnects", self.bus.reconnects)
        for fate, count in self.bus.counts.copy().items():
            yield sample("bus_messages", count, fate=fate)

    def _on_signal(self, number: int) -> None:
        if self._stopping.is_set():
            os._exit(128 + number)  # the second signal: at once, as asked
        self.stop()

    def _fail(self, error: BaseException) -> None:
        if self._error is None and self.state is not State.GONE:
            self._error = error
            if self._main is not None:
                self._main.cancel()

    def _spawned(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            self._fail(error)


def run(service: Coroutine[Any, Any, None], config: MeshConfig) -> int:
    """Run a service to its end; what ``main`` of every service returns. Errors become one line on stderr and status 1.

    Also sets up logging: one line per record on stderr.
    After a failure the process ends at once: threads that still load or compute have nothing left to say.
    """
    level = config.log_level.upper()
    if level not in LOG_LEVELS:
        service.close()
        raise ConfigError("--log-level", f"{config.log_level!r} is not one of {', '.join(LOG_LEVELS).lower()}")
    logging.basicConfig(level=level, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    runner = asyncio.Runner()
    try:
        runner.run(service)
    except Stopped:
        _leave(0)
    except MoemeshError as error:
        print(f"error: {error}", file=sys.stderr)
        _leave(1)
    except Exception as error:  # noqa: BLE001  (the outermost loop of a process)
        traceback.print_exception(error)
        _leave(1)
    runner.close()
    return 0


def _leave(status: int) -> None:
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def _version() -> str:
    try:
        return metadata.version("moemesh")
    except metadata.PackageNotFoundError:
        return ""
