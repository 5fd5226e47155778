"""kill -9 of the attention instance that leads a group: the others go on alone, its streams go on elsewhere."""

from tests.failure.test_killed_services import BODY, serves_again, streams
from tests.mesh import running_mesh

GROUPS = 'moemesh_groups_total{outcome="formed"}'


def test_killing_the_leader_of_a_group_under_streams_changes_no_byte() -> None:
    with running_mesh(attention=2, experts=2, mesh="leader", settings={"group_wait": "0.5"}) as mesh:
        expected = mesh.complete(**BODY)["choices"][0]["text"]
        read = mesh.metrics_of("attention-1")
        running = streams(mesh, 6)
        while read(GROUPS) == 0 and not all(future.done() for future in running):
            pass  # the streams end: it is their time that bounds this
        assert read(GROUPS) > 0
        mesh.kill("attention-0")
        assert {future.result(180) for future in running} == {expected}
        serves_again(mesh, expected)
