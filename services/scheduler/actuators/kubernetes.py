"""``--actuator kubernetes``: replicas of Deployments, by their scale subresource.

Speaks the API of ``apps/v1`` over HTTP with the pod's service account. Knows no pods: which ones end is up to the
ReplicaSet, and they drain after SIGTERM.
"""

import ssl
from collections.abc import Mapping
from pathlib import Path

import httpx

from services.scheduler.actuators.base import ActuatorFailed
from shared.errors import ConfigError
from shared.messages import Pool

ACCOUNT = Path("/var/run/secrets/kubernetes.io/serviceaccount")
"""Where a pod finds its token, namespace and the certificate of the API server."""
LIMIT_S = 10.0


class KubernetesActuator:
    """Patches ``deployments/scale``.

    Args:
        url: of the API server.
        namespace: of the Deployments; empty: that of the service account.
        deployments: their names.
        account: directory of the service account.
        transport: instead of HTTPS, for tests.

    Raises ConfigError where there is no service account.
    """

    def __init__(
        self,
        url: str,
        namespace: str,
        deployments: Mapping[Pool, str],
        account: Path = ACCOUNT,
        transport: httpx.AsyncBaseTransport | None = None,
    ) -> None:
        try:
            self._namespace = namespace or (account / "namespace").read_text().strip()
            verify = ssl.create_default_context(cafile=str(account / "ca.crt")) if transport is None else True
        except OSError as error:
            raise ConfigError("--actuator", f"kubernetes needs a pod's service account: {account}: {error}") from error
        self._token = account / "token"
        self._deployments = deployments
        self._client = httpx.AsyncClient(base_url=url, verify=verify, transport=transport, timeout=LIMIT_S)

    async def scale(self, pool: Pool, count: int) -> None:
        """See ``Actuator``."""
        path = f"/apis/apps/v1/namespaces/{self._namespace}/deployments/{self._deployments[pool]}/scale"
        headers = {"authorization": f"Bearer {self._read_token()}", "content-type": "application/merge-patch+json"}
        try:
            answer = await self._client.patch(path, headers=headers, json={"spec": {"replicas": count}})
        except httpx.HTTPError as error:
            raise ActuatorFailed(f"kubernetes: {self._client.base_url} does not answer: {error!r}") from error
        if answer.status_code != httpx.codes.OK:
            raise ActuatorFailed(f"kubernetes: {self._problem(answer, self._deployments[pool])}")

    def _read_token(self) -> str:
        """Read anew each time: the cluster replaces it."""
        try:
            return self._token.read_text().strip()
        except OSError as error:
            raise ActuatorFailed(f"kubernetes: {self._token}: {error.strerror}") from error

    def _problem(self, answer: httpx.Response, deployment: str) -> str:
        """What was wrong and what to do, from a Status object."""
        said = _message(answer)
        if answer.status_code == httpx.codes.UNAUTHORIZED:
            return f"the token in {self._token} is not accepted: {said}"
        if answer.status_code == httpx.codes.FORBIDDEN:
            return (
                f"the service account may not patch deployments/scale in namespace {self._namespace}; give its Role "
                f"apiGroups [apps], resources [deployments/scale], verbs [patch] ({said})"
            )
        if answer.status_code == httpx.codes.NOT_FOUND:
            return (
                f"there is no Deployment {deployment} in namespace {self._namespace}; name it with "
                f"--attention-deployment or --experts-deployment ({said})"
            )
        return f"{deployment}: status {answer.status_code}: {said}"

    async def close(self) -> None:
        """Close the connection."""
        await self._client.aclose()


def _message(answer: httpx.Response) -> str:
    """Of a Status object; else the text that came instead."""
    try:
        return str(answer.json()["message"])
    except (ValueError, KeyError, TypeError):
        return answer.text[:200]
