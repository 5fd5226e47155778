"""The Docker Engine API over its Unix socket, as far as the compose actuator needs it. Knows nothing of moemesh."""

import json
from collections.abc import Mapping
from typing import Any

import httpx

from services.scheduler.actuators.base import ActuatorFailed

LIMIT_S = 30.0


class EngineRefused(ActuatorFailed):
    """The engine said no; carries the HTTP status."""

    def __init__(self, status: int, problem: str) -> None:
        super().__init__(problem)
        self.status = status


class DockerEngine:
    """Every method raises EngineRefused when the engine says no, and ActuatorFailed when it does not answer.

    ``transport``: instead of the socket, for tests.
    """

    def __init__(self, socket: str, transport: httpx.AsyncBaseTransport | None = None) -> None:
        self._socket = socket
        transport = transport or httpx.AsyncHTTPTransport(uds=socket)
        self._client = httpx.AsyncClient(base_url="http://docker", transport=transport, timeout=LIMIT_S)

    async def containers(self, labels: Mapping[str, str]) -> list[dict[str, Any]]:
        """All that have these labels, stopped ones too."""
        filters = json.dumps({"label": [f"{name}={value}" for name, value in labels.items()]})
        return await self._ask("GET", "/containers/json", params={"all": "true", "filters": filters})

    async def inspect(self, container: str) -> dict[str, Any]:
        """Everything about one, by id or name."""
        return await self._ask("GET", f"/containers/{container}/json")

    async def create(self, name: str, body: Mapping[str, Any]) -> str:
        """Returns its id."""
        return (await self._ask("POST", "/containers/create", params={"name": name}, json=body))["Id"]

    async def connect(self, network: str, container: str, endpoint: Mapping[str, Any]) -> None:
        """Attach a container to one more network."""
        await self._ask(
            "POST", f"/networks/{network}/connect", json={"Container": container, "EndpointConfig": endpoint}
        )

    async def start(self, container: str) -> None:
        """No-op when it runs."""
        await self._ask("POST", f"/containers/{container}/start")

    async def stop(self, container: str, grace_s: int) -> None:
        """SIGTERM, and SIGKILL after so many seconds; no-op when it does not run."""
        path = f"/containers/{container}/stop"
        await self._ask("POST", path, params={"t": str(grace_s)}, timeout=grace_s + LIMIT_S)

    async def remove(self, container: str) -> None:
        """Also one that runs, with its anonymous volumes; no-op when there is none."""
        try:
            await self._ask("DELETE", f"/containers/{container}", params={"v": "true", "force": "true"})
        except EngineRefused as error:
            if error.status != httpx.codes.NOT_FOUND:
                raise

    async def close(self) -> None:
        """Close the connection."""
        await self._client.aclose()

    async def _ask(self, method: str, path: str, **how: Any) -> Any:
        try:
            answer = await self._client.request(method, path, **how)
        except httpx.HTTPError as error:
            raise ActuatorFailed(f"compose: {self._no_answer(error)}") from error
        if answer.is_error:
            raise EngineRefused(answer.status_code, f"compose: {method} {path}: {_message(answer)}")
        return answer.json() if answer.content else None

    def _no_answer(self, error: httpx.HTTPError) -> str:
        text = str(error) or repr(error)
        if "Permission denied" in text:
            return f"{self._socket} may not be used by this user; add the socket's group to the scheduler (group_add)"
        if "No such file" in text:
            return f"there is no {self._socket}; mount the socket of the Docker Engine, or name it with --docker-socket"
        return f"the Docker Engine on {self._socket} does not answer: {text}"


def _message(answer: httpx.Response) -> str:
    """The engine's own words, else the status."""
    try:
        return str(answer.json()["message"])
    except (ValueError, KeyError, TypeError):
        return f"status {answer.status_code}"
