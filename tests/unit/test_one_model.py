"""Which of two models leaves the mesh."""

import pytest

from shared.membership import Member
from shared.messages import Heartbeat, Kind, ModelFacts, State
from shared.one_model import ruled_out_by


def model(digest: str) -> ModelFacts:
    return ModelFacts(name=digest, digest=digest, layers=1, moe_layers=(0,), experts=2, top_k=1)


def ready(*digests: str) -> list[Member]:
    """READY members with these models."""
    return [
        Member(
            Heartbeat(kind=Kind.EXPERTS, id=f"e{i}", incarnation=i, state=State.READY, node="n", model=model(d)), 0.0
        )
        for i, d in enumerate(digests)
    ]


@pytest.mark.parametrize(
    ("joined", "others", "placed", "ruler"),
    [
        (False, (), None, None),
        (False, (), "b", None),  # a placement that nobody serves binds nobody
        (False, ("a",), "b", None),
        (False, ("b",), None, "e0"),
        (False, ("b",), "a", "e0"),
        (False, ("a", "b"), "b", "e1"),
        (False, ("b", "a"), "a", None),  # the foreign one will leave
        (True, ("b", "a"), "a", None),
        (True, ("b", "a"), "b", "e0"),
        (True, ("b", "a"), None, None),  # the placement will tell
    ],
)
def test_the_first_to_be_ready_decide_and_then_the_placement(
    joined: bool, others: tuple[str, ...], placed: str | None, ruler: str | None
) -> None:
    found = ruled_out_by(model("a"), joined, ready(*others), placed)
    assert (found.id if found else None) == ruler
