"""Which cores the processes of ``moemesh up`` compute on, and how a person names cores."""

import pytest

from shared.cli.mesh import MeshOptions, cores_for
from shared.config import parse_cores
from shared.errors import ConfigError


@pytest.mark.parametrize(
    ("count", "cores", "expected"),
    [
        (2, [0, 1], ["0", "1"]),
        (1, [0, 1], ["0,1"]),
        (3, [4, 5], ["4", "5", "4"]),
        (2, [0, 1, 2, 3, 8], ["0,1", "2,3"]),
    ],
)
@pytest.mark.parametrize("kind", ["experts", "attention"])
def test_instances_of_a_pool_share_the_cores_and_others_may_use_any(
    kind: str, count: int, cores: list[int], expected: list[str]
):
    options = MeshOptions(experts=count, attention=count)
    assert [cores_for(f"{kind}-{i}", options, cores) for i in range(count)] == expected
    assert cores_for("gateway-0", options, cores) == ""


@pytest.mark.parametrize(("text", "expected"), [("", set()), ("3", {3}), ("0,2-4, 7", {0, 2, 3, 4, 7})])
def test_cores_are_numbers_and_ranges(text: str, expected: set[int]):
    assert parse_cores("--cores", text) == expected


@pytest.mark.parametrize("text", ["x", "1-", "0;1"])
def test_what_is_no_list_of_cores_is_refused_by_the_settings_name(text: str):
    with pytest.raises(ConfigError, match="--cores"):
        parse_cores("--cores", text)
