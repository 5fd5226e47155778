"""``moemesh up --monolith``: one instance with everything in it answers with the bits of a mesh."""

import json
import subprocess
import sys
from typing import Any

import httpx
import pytest

from tests.up import STOP_LIMIT_S, ready_url, up

MESH = "monolith"
BODIES: list[dict[str, Any]] = [
    {"prompt": "In the beginning", "max_tokens": 48, "temperature": 0, "logprobs": 5},
    {"prompt": "def main(" * 20, "max_tokens": 24, "temperature": 1.0, "seed": 7, "n": 4, "logprobs": 2, "echo": True},
]


def choices(url: str, body: dict[str, Any]) -> list[dict[str, Any]]:
    body = {**body, "ignore_eos": True, "return_token_ids": True}
    response = httpx.post(url + "/v1/completions", json=body, timeout=120)
    assert response.status_code == 200, response.text
    return response.json()["choices"]


def instances() -> list[dict[str, Any]]:
    command = [sys.executable, "-m", "shared.cli.main", "status", "--mesh", MESH, "--json"]
    return json.loads(subprocess.run(command, capture_output=True, text=True, timeout=60).stdout)["instances"]


@pytest.mark.parametrize("api_url", ["mesh"], indirect=True, scope="package")
def test_a_monolith_answers_with_the_tokens_and_logprob_bits_of_a_mesh(api_url: str) -> None:
    with up("--monolith", "--mesh", MESH) as (process, _):
        url = ready_url(process)
        for body in BODIES:
            assert choices(url, body) == choices(api_url, body)
        seen = {i["kind"]: i for i in instances()}
        assert sorted(seen) == ["attention", "gateway"]
        assert seen["attention"]["facts"]["monolith"]
        process.terminate()
        assert process.wait(STOP_LIMIT_S) == 0
