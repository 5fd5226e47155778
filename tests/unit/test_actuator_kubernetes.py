"""The kubernetes actuator against recorded exchanges with an API server."""

import json
from pathlib import Path
from typing import Any

import httpx
import pytest

from services.scheduler.actuators.base import ActuatorFailed
from services.scheduler.actuators.kubernetes import KubernetesActuator
from shared.errors import ConfigError
from shared.messages import Pool
from tests.unit.recorded_api import Exchange, Recorded

NAMES = {Pool.ATTENTION: "moemesh-attention", Pool.EXPERTS: "moemesh-experts"}
PATH = "/apis/apps/v1/namespaces/serving/deployments/moemesh-experts/scale"
SCALED = {
    "kind": "Scale",
    "apiVersion": "autoscaling/v1",
    "metadata": {
        "name": "moemesh-experts",
        "namespace": "serving",
        "uid": "4a5ab1f4-3c6e-4f6e-9a3e-6c8b3a7f3b1e",
        "resourceVersion": "48211",
        "creationTimestamp": "2025-11-03T09:14:07Z",
    },
    "spec": {"replicas": 3},
    "status": {"replicas": 2, "selector": "app=moemesh-experts"},
}


def status(code: int, reason: str, message: str) -> dict[str, Any]:
    """A Status object, as the API server answers what it refuses."""
    head = {"kind": "Status", "apiVersion": "v1", "metadata": {}, "status": "Failure"}
    return head | {"message": message, "reason": reason, "code": code}


FORBIDDEN = status(
    403,
    "Forbidden",
    'deployments.apps "moemesh-experts" is forbidden: User "system:serviceaccount:serving:default" cannot patch '
    'resource "deployments/scale" in API group "apps" in the namespace "serving"',
)
ABSENT = status(404, "NotFound", 'deployments.apps "moemesh-experts" not found')
STRANGER = status(401, "Unauthorized", "Unauthorized")
INVALID = status(422, "Invalid", "spec.replicas: Invalid value")


@pytest.fixture
def account(tmp_path: Path) -> Path:
    (tmp_path / "token").write_text("first\n")
    (tmp_path / "namespace").write_text("serving")
    return tmp_path


def actuator(account: Path, recorded: Recorded, namespace: str = "") -> KubernetesActuator:
    return KubernetesActuator("https://kubernetes.default.svc", namespace, NAMES, account, recorded.transport)


async def test_replicas_are_patched_with_the_token_that_is_there_now(account: Path):
    heads = [
        {"authorization": f"Bearer {t}", "content-type": "application/merge-patch+json"} for t in ("first", "next")
    ]
    recorded = Recorded([Exchange("PATCH", PATH, SCALED, headers=head) for head in heads])
    made = actuator(account, recorded)
    await made.scale(Pool.EXPERTS, 3)
    (account / "token").write_text("next\n")
    await made.scale(Pool.EXPERTS, 3)
    await made.close()
    assert [json.loads(request.content) for request in recorded.requests] == [{"spec": {"replicas": 3}}] * 2
    assert not recorded.left


async def test_another_namespace_may_be_named(account: Path):
    path = PATH.replace("/serving/", "/elsewhere/").replace("experts", "attention")
    recorded = Recorded([Exchange("PATCH", path, SCALED)])
    await actuator(account, recorded, "elsewhere").scale(Pool.ATTENTION, 3)
    assert not recorded.left


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        (
            FORBIDDEN,
            r"may not patch deployments/scale in namespace serving; give its Role .*verbs \[patch\] .*forbidden",
        ),
        (ABSENT, r"no Deployment moemesh-experts in namespace serving; name it with .*--experts-deployment"),
        (STRANGER, r"the token in .*token is not accepted: Unauthorized"),
        (INVALID, r"moemesh-experts: status 422: spec.replicas"),
    ],
)
async def test_what_the_api_server_refuses_is_said_with_what_to_do(account: Path, answer: dict[str, Any], words: str):
    recorded = Recorded([Exchange("PATCH", PATH, answer, status=answer["code"])])
    with pytest.raises(ActuatorFailed, match=words):
        await actuator(account, recorded).scale(Pool.EXPERTS, 3)


async def test_an_api_server_that_does_not_answer_is_named(account: Path):
    def refuse(request: httpx.Request) -> httpx.Response:
        raise httpx.ConnectError("connection refused", request=request)

    made = KubernetesActuator("https://kubernetes.default.svc", "", NAMES, account, httpx.MockTransport(refuse))
    with pytest.raises(ActuatorFailed, match=r"https://kubernetes.default.svc does not answer: .*connection refused"):
        await made.scale(Pool.EXPERTS, 3)


def test_outside_of_a_pod_it_does_not_start(tmp_path: Path):
    with pytest.raises(ConfigError, match="--actuator: kubernetes needs a pod's service account"):
        KubernetesActuator("https://kubernetes.default.svc", "", NAMES, tmp_path)


async def test_a_token_that_is_gone_fails_the_change(account: Path):
    made = actuator(account, Recorded([]))
    (account / "token").unlink()
    with pytest.raises(ActuatorFailed, match="token: No such file"):
        await made.scale(Pool.EXPERTS, 3)
