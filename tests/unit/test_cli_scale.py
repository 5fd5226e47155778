"""What `moemesh scale` says and waits for, and what `moemesh up` does for it."""

from collections.abc import Sequence

import pytest
from typer.testing import CliRunner

from shared.cli.main import build_app
from shared.cli.mesh import LocalMesh, MeshOptions
from shared.cli.scale import explain, failure, reached, standing
from shared.cli.status import describe, describe_pools
from shared.errors import Refused
from shared.membership import Member
from shared.messages import Heartbeat, Kind, Pool, PoolFacts, State
from shared.pool_messages import Resize, Scale, ScalePlan

E = Pool.EXPERTS


def leader(desired: int | None, problem: str = "") -> Member:
    facts = () if desired is None else (PoolFacts(pool=E, desired=desired, problem=problem),)
    beat = Heartbeat(kind=Kind.SCHEDULER, id="s", incarnation=1, state=State.READY, node="n", pools=facts)
    return Member(beat, 0.0)


def experts(*states: State) -> list[Member]:
    fields = {"kind": Kind.EXPERTS, "incarnation": 1, "node": "n", "detail": "loading layer 3"}
    return [Member(Heartbeat(id=f"experts-{i}", state=s, **fields), 0.0) for i, s in enumerate(states)]  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("desired", "states", "there"),
    [
        (2, [State.READY, State.READY], True),
        (2, [State.READY, State.STARTING], False),
        (2, [State.READY, State.READY, State.DRAINING], False),
        (3, [State.READY, State.READY], False),
        (None, [State.READY, State.READY], False),
    ],
)
def test_a_pool_is_reached_when_the_leader_wants_it_and_nobody_comes_or_goes_any_more(
    desired: int | None, states: Sequence[State], there: bool
):
    assert reached([leader(desired), *experts(*states)], E, 2) is there


def test_no_instance_is_a_size_too():
    assert reached([leader(0)], E, 0)


def test_a_change_that_failed_and_one_that_somebody_replaced_end_the_wait():
    assert failure([leader(2)], E, 2) == failure([leader(None)], E, 2) == ""
    assert "no engine; the scheduler goes on trying" in failure([leader(2, "no engine")], E, 2)
    assert failure([leader(4)], E, 2) == "experts: somebody else wants 4 meanwhile"
    assert failure([leader(4), leader(2)], E, 2) == "", "one of them has just died"


def test_what_holds_a_pool_up_is_said():
    members = [leader(2), *experts(State.READY, State.STARTING)]
    assert standing(members, E, 2) == "experts: 1 of 2 ready; experts-1 is starting loading layer 3"


def test_what_will_happen_is_said():
    def said(present: int) -> list[str]:
        return explain(Scale(pool=E, count=2), ScalePlan(actuator="local", present=present, notes=("a note",)))

    assert said(1) == ["experts: 1 now, 2 wanted: local starts 1", "a note"]
    assert said(5)[0].endswith("local drains 3")
    assert said(2)[0].endswith("nothing to do")


def test_status_shows_pools_that_somebody_has_asked_for():
    members = [leader(3, "no engine"), *experts(State.READY, State.STARTING)]
    assert describe_pools(members) == {"experts": {"desired": 3, "ready": 1, "problem": "no engine"}}
    assert describe([leader(None)], None)["pools"] == {}


@pytest.mark.parametrize(("pool", "count"), [(Pool.ATTENTION, 0), (E, -1), (E, 65), (Pool.ATTENTION, 1000)])
async def test_up_refuses_sizes_that_must_be_mistakes(pool: Pool, count: int):
    with pytest.raises(Refused, match=f"to 64 processes of {pool}"):
        await LocalMesh(MeshOptions())._resize(Resize(pool=pool, count=count))


async def test_up_starts_nobody_while_it_stops():
    mesh = LocalMesh(MeshOptions())
    await mesh.stop()
    with pytest.raises(Refused, match="stopping"):
        await mesh._resize(Resize(pool=E, count=1))


def test_the_scheduler_of_up_asks_up_unless_it_is_told_otherwise(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("MOEMESH_ACTUATOR", raising=False)
    mesh = LocalMesh(MeshOptions())
    assert mesh._environ("scheduler-0")["MOEMESH_ACTUATOR"] == "local"
    assert "MOEMESH_ACTUATOR" not in mesh._environ("experts-0")
    assert LocalMesh(MeshOptions(settings={"actuator": "none"}))._environ("scheduler-0")["MOEMESH_ACTUATOR"] == "none"
    monkeypatch.setenv("MOEMESH_ACTUATOR", "external")
    assert mesh._environ("scheduler-0")["MOEMESH_ACTUATOR"] == "external"


def test_other_pools_than_the_two_are_no_usage():
    result = CliRunner().invoke(build_app(), ["scale", "gateway", "2"])
    assert result.exit_code == 2
