"""What ``moemesh up`` starts."""

from typer.testing import CliRunner

from shared.cli.main import build_app
from shared.cli.mesh import MeshOptions, service_arguments


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
