"""A paced mesh: the bits of an unpaced one at the speed of a profile, and it says so wherever it is asked."""

import json
from pathlib import Path
from typing import Any

import httpx
import pytest

from bench.common import refuse_paced
from shared.cli.children import ChildDied
from shared.cli.status import describe, device, look
from shared.device_profile import experts_seconds, load_profile
from shared.messages import Kind
from tests.mesh import RunningMesh, running_mesh

REQUESTS: tuple[dict[str, Any], ...] = (
    {"prompt": "In the beginning God created", "max_tokens": 12, "temperature": 0, "logprobs": 3},
    {"prompt": "And the LORD said unto Moses, " * 20, "max_tokens": 12, "seed": 5, "logprobs": 3, "n": 3},
)
FIGURES = {
    "name": "paced-test", "attention_floor_s": 0.001, "shared_s": 0.001, "experts_s": 0.001, "expert_s": 0.0001,
    "head_s": 0.001, "link_latency_s": 0.002, "link_bytes_per_s": 1e9, "send_s": 1e-5,
}  # fmt: skip


def outputs(mesh: RunningMesh) -> list[list[Any]]:
    """Token ids, text and log-probabilities of every choice."""
    answers = [mesh.complete(return_token_ids=True, **request) for request in REQUESTS]
    return [[(c["token_ids"], c["text"], c["logprobs"]) for c in answer["choices"]] for answer in answers]


def metric(mesh: RunningMesh, url: str, name: str) -> float:
    lines = httpx.get(url + "/metrics", timeout=30).text.splitlines()
    return next(float(line.split()[-1]) for line in lines if line.startswith(f"moemesh_{name}"))


def test_a_paced_mesh_gives_the_same_bits_at_the_speed_of_its_profile_and_is_labelled(tmp_path: Path) -> None:
    with running_mesh(attention=1, experts=1) as mesh:
        expected = outputs(mesh)
        mesh.call(refuse_paced(mesh.mesh))
    profile = tmp_path / "profile.json"
    profile.write_text(json.dumps(FIGURES))
    with running_mesh(attention=1, experts=1, settings={"pace": str(profile), "micro_batches": "2"}) as mesh:
        assert outputs(mesh) == expected
        members, placement = mesh.call(look(mesh.mesh.nats_url, mesh.mesh.options.mesh))
        instances = {row["kind"]: row for row in describe(members, placement)["instances"]}
        assert {kind: row["paced"] for kind, row in instances.items()} == {
            "gateway": "", "scheduler": "", "attention": "paced-test", "experts": "paced-test",
        }  # fmt: skip
        assert device(instances[Kind.EXPERTS]) == "cpu, paced by paced-test"
        for kind in (Kind.ATTENTION, Kind.EXPERTS):
            assert metric(mesh, instances[kind]["url"], 'paced{profile="paced-test"}') == 1
        model = next(m.heartbeat.model for m in members if m.heartbeat.model)
        exchanges = metric(mesh, instances[Kind.ATTENTION]["url"], "steps_total") * len(model.moe_layers)
        least = exchanges * experts_seconds(load_profile("--pace", str(profile)), 1)
        assert metric(mesh, instances[Kind.EXPERTS]["url"], "paced_seconds_total") >= least
        with pytest.raises(RuntimeError, match=r"attention-0 by paced-test, experts-0 by paced-test"):
            mesh.call(refuse_paced(mesh.mesh))
    assert sum("paced by paced-test (no source given)" in line for line in mesh.log) == 2


def test_a_bad_profile_stops_the_mesh_with_its_file_and_key(tmp_path: Path) -> None:
    profile = tmp_path / "bad.toml"
    profile.write_text("link_latency = 5")
    with (
        pytest.raises(ChildDied, match=r"bad\.toml: unknown key link_latency"),
        running_mesh(attention=1, experts=1, settings={"pace": str(profile)}),
    ):
        pass
