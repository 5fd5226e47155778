"""What ``moemesh up`` starts."""

import tempfile
from contextlib import ExitStack
from pathlib import Path

import pytest
from pytest import MonkeyPatch
from typer.testing import CliRunner

from shared.cli.main import build_app
from shared.cli.mesh import ADDRESS, NATS_DIRECTORY, MeshOptions, local_nats, service_arguments
from shared.cli.owned import owned_directory
from shared.errors import ConfigError


def test_a_mesh_has_a_scheduler_and_its_pools() -> None:
    names = service_arguments(MeshOptions(attention=1, experts=2))
    assert list(names) == ["scheduler-0", "experts-0", "experts-1", "attention-0", "gateway-0"]
    assert "--monolith" not in names["attention-0"]


def test_without_experts_attention_is_a_monolith_that_needs_no_scheduler() -> None:
    names = service_arguments(MeshOptions(attention=1, experts=0))
    assert list(names) == ["attention-0", "gateway-0"]
    assert names["attention-0"] == ["attention", "--monolith"]


def test_a_monolith_with_expert_instances_is_refused_by_name() -> None:
    result = CliRunner().invoke(build_app(), ["up", "--monolith", "--experts", "2"])
    assert result.exit_code == 2
    assert "--experts" in result.output
    assert "monolith" in result.output


def test_a_monolith_that_is_to_be_sized_by_demand_is_refused_by_name() -> None:
    result = CliRunner().invoke(build_app(), ["up", "--monolith", "--autoscale", "on"])
    assert result.exit_code == 2
    assert "--autoscale" in result.output


def test_a_limit_without_autoscaling_is_refused_by_name() -> None:
    result = CliRunner().invoke(build_app(), ["up", "--slo-tpot-ms", "60"], env={"MOEMESH_AUTOSCALE": ""})
    assert result.exit_code == 2
    assert "--autoscale" in result.output


def test_of_two_meshes_with_one_name_none_is_taken_for_the_other(tmp_path: Path, monkeypatch: MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    with ExitStack() as stack:
        first, second, third = (stack.enter_context(owned_directory(NATS_DIRECTORY)) for _ in range(3))
        (first / ADDRESS).write_text("a\nnats://x:1\n")
        (second / ADDRESS).write_text("b\nnats://x:2\n")
        assert (local_nats("a"), local_nats("c")) == ("nats://x:1", "")
        (third / ADDRESS).write_text("a\nnats://x:3\n")
        with pytest.raises(ConfigError, match=r"--nats: 2 meshes here are called 'a': .*nats://x:(1.*3|3.*1)"):
            local_nats("a")
