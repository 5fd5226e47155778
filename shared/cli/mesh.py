"""A whole mesh on this machine: which processes it has, when it is ready, and how it stops.

Used by ``moemesh up``, ``moemesh demo``, the tests and the benches.
"""

import asyncio
import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import AsyncExitStack, suppress
from dataclasses import dataclass, field, replace
from typing import Self

import httpx

from shared.bus import Bus
from shared.cli.children import Child, ChildDied, cores
from shared.cli.owned import living, owned_directory
from shared.cli.serve import FOLLOW_PARENT
from shared.errors import ConfigError, MoemeshError, Refused
from shared.membership import Members
from shared.messages import Heartbeat, Kind, Subjects
from shared.nats_server import NatsServer
from shared.pool_messages import Resize, Resized
from shared.priority import CONTROL_NICENESS, halting_costs

NATS_DIRECTORY, ADDRESS = "moemesh-nats-", "address"
"""Temporary directories of NATS servers of ours, and the file there with mesh and URL."""
READY_LIMIT_S = 600.0
STOP_LIMIT_S = 40.0
MOST_PROCESSES = 64
"""Of a pool on one machine: a larger number is a mistake."""


@dataclass(frozen=True)
class MeshOptions:
    """What ``moemesh up`` was asked for; empty strings and zeros mean the service's own default."""

    model: str = ""
    attention: int = 1
    experts: int = 2
    """0: monoliths, attention instances that hold every expert themselves."""
    host: str = "127.0.0.1"
    port: int = 8000
    nats: str = ""
    """URL of a running server; empty: start one."""
    mesh: str = "default"
    settings: Mapping[str, str] = field(default_factory=dict)
    """More ``MOEMESH_*`` settings for every service, by field name (e.g. max_model_len)."""
    python: tuple[str, ...] = ("-m", "shared.cli.main")


class MeshFailed(MoemeshError):
    """The mesh did not become ready in time."""


def local_nats(mesh: str) -> str:
    """URL of the NATS server that `up` has started on this machine for a mesh, "" if there is none.

    Raises ConfigError where several meshes have that name.
    """
    found: list[str] = []
    for directory in living(NATS_DIRECTORY):
        with suppress(OSError, ValueError):
            name, url = (directory / ADDRESS).read_text().split()
            found += [url] if name == mesh else []
    if len(found) > 1:
        raise ConfigError("--nats", f"{len(found)} meshes here are called {mesh!r}: name one of {', '.join(found)}")
    return found[0] if found else ""


class LocalMesh:
    """Async context manager around the processes of one mesh.

    Entering returns when the first request can be served; ``url`` is the gateway's address then.
    Raises ChildDied when a service ends while loading, MeshFailed after READY_LIMIT_S seconds.
    """

    def __init__(
        self,
        options: MeshOptions,
        on_line: Callable[[str, str], None] = lambda name, line: None,
        on_heartbeat: Callable[[Heartbeat], None] = lambda heartbeat: None,
    ) -> None:
        self.options = options
        self.url = ""
        self.children: dict[str, Child] = {}
        self.nats: NatsServer | None = None
        self.nats_url = options.nats
        self._on_line = on_line
        self._on_heartbeat = on_heartbeat
        self._stack = AsyncExitStack()
        self._keepers: dict[str, asyncio.Task[None]] = {}
        self._scaling = asyncio.Lock()
        self._stopping = False

    async def __aenter__(self) -> Self:
        try:
            await self._start()
        except BaseException:
            await self.stop()
            raise
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.stop()

    async def _start(self) -> None:
        if not self.nats_url:
            store = self._stack.enter_context(owned_directory(NATS_DIRECTORY))
            self.nats = await self._stack.enter_async_context(NatsServer(store))
            self.nats_url = self.nats.url
            (store / ADDRESS).write_text(f"{self.options.mesh}\n{self.nats_url}\n")
        for name, argv in service_arguments(self.options).items():
            await self._add(name, argv)
        await self._until_ready()
        self._keep_port()
        self._keepers = {name: asyncio.create_task(child.keep_alive()) for name, child in self.children.items()}
        await self._listen()

    async def _listen(self) -> None:
        """Do what the scheduler asks for, with ``--actuator local``."""
        bus = await Bus.connect(self.nats_url, "moemesh-up")
        self._stack.push_async_callback(bus.close)
        await bus.subscribe(Subjects(self.options.mesh).resize, Resize, self._resize)

    async def _resize(self, request: Resize) -> Resized:
        """Raises Refused."""
        least = 1 if request.pool.kind is Kind.ATTENTION else 0
        if not least <= request.count <= MOST_PROCESSES:
            raise Refused("invalid", f"`moemesh up` runs {least} to {MOST_PROCESSES} processes of {request.pool}")
        await self.scale(request.pool.value, request.count)
        return Resized(names=tuple(self._pool(request.pool.value)))

    def _pool(self, kind: str) -> list[str]:
        """Names of a pool's processes, by number."""
        return sorted((n for n in self.children if n.startswith(f"{kind}-")), key=lambda n: int(n.split("-")[1]))

    async def scale(self, kind: str, count: int) -> None:
        """Have so many instances of a pool, "attention" or "experts"; more are started, not waited for.

        Those with the highest numbers are stopped, which lets them drain. Raises Refused while the mesh stops.
        """
        async with self._scaling:
            if self._stopping:
                raise Refused("draining", "`moemesh up` is stopping")
            names = self._pool(kind)
            await self._remove(names[count:])
            for name in (f"{kind}-{number}" for number in range(len(names), count)):
                if self._stopping:
                    break
                argv = service_arguments(replace(self.options, **{kind: max(1, count) if self.options.experts else 0}))
                await self._add(name, argv[name])
                self._keepers[name] = asyncio.create_task(self.children[name].keep_alive())

    async def _remove(self, names: Sequence[str]) -> None:
        for name in names:
            self._keepers.pop(name).cancel()
        await asyncio.gather(*(self.children[name].stop(STOP_LIMIT_S) for name in names))
        for name in names:
            del self.children[name]

    async def _add(self, name: str, argv: list[str]) -> None:
        child = Child(name, [*self.options.python, "serve", *argv], self._environ(name), self._on_line)
        child.niceness = 0 if name.startswith(("attention", "experts")) else CONTROL_NICENESS
        self.children[name] = child
        await child.start()

    def _environ(self, name: str) -> dict[str, str]:
        """The child's environment: ours, minus MOEMESH_* settings of ours that a flag of ``up`` replaces."""
        options = self.options
        ours = {
            "nats": self.nats_url,
            "mesh": options.mesh,
            "model": options.model,
            "id": name,
            **options.settings,
        }
        if "MOEMESH_THREADS" not in os.environ:
            ours.setdefault("threads", str(threads_for(name, options, cores())))
        if "MOEMESH_CORES" not in os.environ:
            ours.setdefault("cores", cores_for(name, options, sorted(os.sched_getaffinity(0))))
        if "MOEMESH_ACTUATOR" not in os.environ and name.startswith("scheduler"):
            ours.setdefault("actuator", "local")
        if "MOEMESH_KEEP_AWAKE" not in os.environ and name.startswith("attention"):
            ours.setdefault("keep_awake", str(halting_costs()).lower())  # expert instances share its cores
        variables = {f"MOEMESH_{k.upper()}": v for k, v in ours.items()} | {FOLLOW_PARENT: "1"}
        local = {} if self.options.nats else {"UCX_NET_DEVICES": "lo"}  # nobody elsewhere can be part of this mesh
        return local | dict(os.environ) | variables

    async def _until_ready(self) -> None:
        """Wait for the gateway's /ready, and on every child's exit, with a limit."""
        ready = asyncio.create_task(self._gateway_ready())
        deaths = {asyncio.create_task(child.wait()): child for child in self.children.values()}
        try:
            done, _ = await asyncio.wait({ready, *deaths}, timeout=READY_LIMIT_S, return_when=asyncio.FIRST_COMPLETED)
            if ready in done:
                self.url = ready.result()
                return
            for task in done:
                child = deaths[task]  # type: ignore[index]
                raise ChildDied(child.name, task.result(), list(child.lines))  # type: ignore[arg-type]
            raise MeshFailed(f"the mesh was not ready within {READY_LIMIT_S:.0f} s")
        finally:
            for task in (ready, *deaths):
                task.cancel()

    async def _gateway_ready(self) -> str:
        """The gateway's URL once its /ready answers 200; heartbeats tell where it listens."""
        bus = await Bus.connect(self.nats_url, "moemesh-up")
        members = Members(self.options.mesh)
        try:
            await members.watch(bus)
            members.on_change(lambda: self._report(members))
            async with httpx.AsyncClient(timeout=5.0) as client:
                while True:
                    for gateway in members.ready(Kind.GATEWAY):
                        if await is_ready(client, gateway.heartbeat.url):
                            return gateway.heartbeat.url
                    await asyncio.sleep(0.05)
        finally:
            await bus.close()

    def _keep_port(self) -> None:
        """A gateway that is started again must be found where it was, also when any port was fine at first."""
        gateway = self.children["gateway-0"]
        gateway.argv[gateway.argv.index("--port") + 1] = self.url.rpartition(":")[2]

    def _report(self, members: Members) -> None:
        for member in members.all():
            self._on_heartbeat(member.heartbeat)

    async def stop(self) -> None:
        """Drain: first the gateway (it finishes its streams), then the rest together, then NATS."""
        self._stopping = True
        for keeper in self._keepers.values():
            keeper.cancel()
        gateways = [c for name, c in self.children.items() if name.startswith("gateway")]
        others = [c for name, c in self.children.items() if not name.startswith("gateway")]
        for group in (gateways, others):
            await asyncio.gather(*(child.stop(STOP_LIMIT_S) for child in group))
        await self._stack.aclose()


def service_arguments(options: MeshOptions) -> dict[str, list[str]]:
    """Name of each process -> arguments of ``serve``."""
    names = {"scheduler-0": ["scheduler"]} if options.experts else {}
    names |= {f"experts-{i}": ["experts"] for i in range(options.experts)}
    attention = ["attention"] if options.experts else ["attention", "--monolith"]
    names |= {f"attention-{i}": attention for i in range(options.attention)}
    names["gateway-0"] = ["gateway", "--host", options.host, "--port", str(options.port)]
    return names


def threads_for(name: str, options: MeshOptions, cores: int) -> int:
    """Compute threads of a process: attention and experts take turns, so each pool may use every core."""
    instances = {"attention": options.attention, "experts": options.experts}.get(name.split("-")[0])
    return max(1, cores // instances) if instances else 1


def cores_for(name: str, options: MeshOptions, cores: list[int]) -> str:
    """Where a process's compute threads run: each instance of a pool on its share, so that none queues for a core.

    Expert instances all start at the same moment, while the attention instance still holds a core: the kernel would
    place two of them on the other one. A thread of attention would start where an expert instance is still polling.
    """
    kind, _, number = name.partition("-")
    instances = {"attention": options.attention, "experts": options.experts}.get(kind)
    if not instances:
        return ""
    share = max(1, len(cores) // instances)
    first = int(number) * share % len(cores)
    return ",".join(map(str, cores[first : first + share]))


async def is_ready(client: httpx.AsyncClient, url: str) -> bool:
    """Whether GET ``url``/ready answers 200."""
    try:
        return (await client.get(url + "/ready")).status_code == 200
    except httpx.HTTPError:
        return False
