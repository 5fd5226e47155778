"""Groups, phases and the side of the gate: whichever way an exchange goes, every member gets the local bytes."""

import pytest

from services.attention import groups
from services.attention.ways import APART, Gate, Phase, Way
from services.experts.answers import KnownPlacement
from services.experts.server import ExpertServer
from services.experts.waiting import Question
from shared.exchange_frames import Flag
from tests.unit.toy_groups import group_mesh, undisturbed

ONE_NODE, TWO_NODES = ("a", "a"), ("x", "x", "y", "y")


@pytest.fixture(autouse=True)
def patient_meetings(monkeypatch: pytest.MonkeyPatch) -> None:
    """Threads of a test are slow to begin their steps."""
    monkeypatch.setattr(groups, "SHORTEST_WAIT_S", 0.5)
    monkeypatch.setattr(groups, "LONGEST_WAIT_S", 0.5)


@pytest.mark.parametrize("nodes", [ONE_NODE, TWO_NODES], ids=["one node", "two nodes"])
@pytest.mark.parametrize("gate", Gate)
@pytest.mark.parametrize("phase", Phase)
@pytest.mark.parametrize("rows", [(3,), (5, 2), (1, 7, 4)], ids=str)
def test_every_way_gives_the_local_bytes(phase, gate, rows, nodes):
    with group_mesh(len(rows), nodes, phase, gate) as mesh:
        assert mesh.steps(rows, 6) == [None] * len(rows)
        assert mesh.formed >= (2 if len(rows) > 1 else 0)
        assert all(undisturbed(member.exchange.stats()) for member in mesh.members)


@pytest.mark.parametrize("gate", Gate)
@pytest.mark.parametrize("phase", Phase)
def test_a_groups_exchange_is_prefill_if_a_members_step_is(phase, gate, monkeypatch):
    """Whatever way its rows go; those of an exchange of its own say what its own step is."""
    asked: list[tuple[int, bool]] = []
    serve = ExpertServer._serve

    def spy(server: ExpertServer, question: Question, placement: KnownPlacement) -> bool:
        done = serve(server, question, placement)
        if question.assembly or not question.incoming.header.flags & Flag.SHARE:
            asked.append((question.incoming.header.group, question.prefill))
        return done

    monkeypatch.setattr(ExpertServer, "_serve", spy)
    with group_mesh(2, TWO_NODES, phase, gate) as mesh:
        assert mesh.steps((5, 2), 4, prefill=1) == [None] * 2
        assert mesh.formed >= 2
    alone = {member.neighbour.incarnation: number == 1 for number, member in enumerate(mesh.members)}
    assert all(prefill == alone.get(group, True) for group, prefill in asked)
    assert any(group not in alone for group, _ in asked) == (Way(phase, gate) != APART)
