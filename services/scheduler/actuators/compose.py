"""``--actuator compose``: containers of a compose project, through the Docker Engine.

New containers are made like the service's first one, under the names and labels that compose itself would give, so that
`docker compose ps`, `up --scale` and `down` take them for its own. The last container of a service is stopped and not
removed: it is what the next ones are made like.
"""

import asyncio
import socket
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import httpx

from services.scheduler.actuators.base import ActuatorFailed
from services.scheduler.actuators.docker_engine import DockerEngine, EngineRefused
from shared.messages import Pool

LABEL = "com.docker.compose."
PROJECT, SERVICE, NUMBER, ONE_OFF = (LABEL + name for name in ("project", "service", "container-number", "oneoff"))
GRACE_S = 40
"""Longer than an instance may drain; compose/common.yaml says the same."""
RUNNING = ("running", "restarting", "paused")
LEAVING = ("removing", "dead")
OWN_CONFIG = ("Hostname", "Domainname", "MacAddress")
"""What each container has for itself."""
ENDPOINT = ("Links", "DriverOpts")
"""What is asked of a network; the rest of an endpoint is what came of it."""


@dataclass(frozen=True)
class Container:
    """One of a service."""

    id: str
    number: int
    running: bool


class ComposeActuator:
    """Scales the services ``attention`` and ``experts``.

    Args:
        docker_socket: path of the engine's socket.
        project: of compose; empty: the one of the container that this process runs in.
        transport: instead of the socket, for tests.
    """

    def __init__(self, docker_socket: str, project: str, transport: httpx.AsyncBaseTransport | None = None) -> None:
        self._engine = DockerEngine(docker_socket, transport)
        self._project = project

    async def scale(self, pool: Pool, count: int) -> None:
        """See ``Actuator``."""
        project = self._project or await self._own_project()
        labels = {PROJECT: project, SERVICE: pool.value, ONE_OFF: "False"}
        found = listed(await self._engine.containers(labels))
        if not found:
            raise ActuatorFailed(
                f"compose: project {project} has no container of service {pool}, not even a stopped one to make others "
                f"like; start one with `docker compose up --scale {pool}=1`"
            )
        if count > sum(c.running for c in found):
            await self._grow(found, count)
        else:
            await self._shrink(found, count)

    async def close(self) -> None:
        """See ``Actuator``."""
        await self._engine.close()

    async def _own_project(self) -> str:
        """Of the container whose id is this host's name."""
        try:
            labels = (await self._engine.inspect(socket.gethostname()))["Config"]["Labels"]
            return labels[PROJECT]
        except (EngineRefused, KeyError) as error:
            raise ActuatorFailed(
                f"compose: the scheduler runs in no container of a compose project here ({error}); name the project "
                "with --compose-project"
            ) from error

    async def _grow(self, found: Sequence[Container], count: int) -> None:
        """Start what is stopped, then more like the first one; all of them, or none."""
        missing = count - sum(c.running for c in found)
        stopped = [c.id for c in found if not c.running][:missing]
        created: list[str] = []
        try:
            for number in free_numbers(found, missing - len(stopped)):
                created.append(await self._create(found[0], number))
            for container in (*stopped, *created):
                await self._engine.start(container)
        except ActuatorFailed:
            await self._undo(stopped, created)
            raise

    async def _create(self, first: Container, number: int) -> str:
        """A container like the first one, not started; its id."""
        pattern = await self._engine.inspect(first.id)
        name, body, others = alike(pattern, number)
        try:
            created = await self._engine.create(name, body)
        except EngineRefused as error:
            raise ActuatorFailed(f"{error}: {name} cannot be made of image {body['Image']}; is it there?") from error
        try:
            for network, endpoint in others.items():
                await self._engine.connect(network, created, endpoint)
        except ActuatorFailed:
            await self._engine.remove(created)
            raise
        return created

    async def _undo(self, stopped: Sequence[str], created: Sequence[str]) -> None:
        await asyncio.gather(*(self._engine.stop(c, GRACE_S) for c in stopped), *map(self._engine.remove, created))

    async def _shrink(self, found: Sequence[Container], count: int) -> None:
        """Those with the highest numbers drain and go; the first one stays, if only as a pattern."""
        surplus = [c for c in found if c.running][count:]
        await asyncio.gather(*(self._engine.stop(c.id, GRACE_S) for c in surplus))
        await asyncio.gather(*(self._engine.remove(c.id) for c in surplus if c is not found[0]))


def listed(answer: Sequence[Mapping[str, Any]]) -> list[Container]:
    """Containers as the engine lists them, by number."""
    there = [c for c in answer if c["State"] not in LEAVING]
    found = [Container(c["Id"], int(c["Labels"].get(NUMBER, 0)), c["State"] in RUNNING) for c in there]
    return sorted(found, key=lambda c: c.number)


def free_numbers(found: Sequence[Container], count: int) -> range:
    """Numbers of ``count`` new containers: those after the highest, as compose counts."""
    first = found[-1].number + 1
    return range(first, first + count)


def alike(pattern: Mapping[str, Any], number: int) -> tuple[str, dict[str, Any], dict[str, Any]]:
    """Another container of the same service.

    Args:
        pattern: a container, as the engine's ``inspect`` describes it.
        number: of the new one.

    Returns:
        Its name, the body of the request that creates it, and by name the networks that it is to be connected to
        afterwards (older engines take one network at the creation).
    """
    config, host = pattern["Config"], pattern["HostConfig"]
    old = config["Labels"]
    name = pattern["Name"].lstrip("/").removesuffix(old[NUMBER]) + str(number)
    endpoints = {net: endpoint(has, old[SERVICE], name) for net, has in pattern["NetworkSettings"]["Networks"].items()}
    main = host.get("NetworkMode", "")
    at_once = {net: endpoints.pop(net) for net in (main,) if net in endpoints}
    body = {key: value for key, value in config.items() if key not in OWN_CONFIG}
    body |= {"Labels": old | {NUMBER: str(number)}, "HostConfig": host}
    return name, body | {"NetworkingConfig": {"EndpointsConfig": at_once}}, endpoints


def endpoint(has: Mapping[str, Any], service: str, name: str) -> dict[str, Any]:
    """What a new container asks of a network that the pattern is in."""
    asked = {key: has[key] for key in ENDPOINT if has.get(key)}
    return asked | {"Aliases": [name, service]}
