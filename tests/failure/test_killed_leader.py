"""kill -9 of the attention instance that leads a group: the others go on alone, its streams go on elsewhere."""

import pytest

from tests.failure.test_killed_services import BODY, serves_again, streams
from tests.mesh import running_mesh

MOST_TRIES = 10
"""The gateway is ready with the first attention instance; the second one joins while requests run."""
GROUPS = 'moemesh_groups_total{outcome="formed"}'


def test_killing_the_leader_of_a_group_under_streams_changes_no_byte() -> None:
    with running_mesh(attention=2, experts=2, mesh="leader", settings={"group_wait": "0.5"}) as mesh:
        expected = mesh.complete(**BODY)["choices"][0]["text"]
        for _ in range(MOST_TRIES):
            assert {future.result(180) for future in streams(mesh, 6)} == {expected}
            if mesh.metrics_of("attention-1")(GROUPS) > 0:
                break
        else:
            pytest.fail("no groups were formed")
        running = streams(mesh, 6)
        mesh.kill("attention-0")
        assert {future.result(180) for future in running} == {expected}
        serves_again(mesh, expected)
