"""Which attention instance gets a request."""

from typing import Any

from services.gateway.routing import context_length, not_ready, ranked, why_not
from shared.membership import Member
from shared.messages import AttentionFacts, Heartbeat, Kind, ModelFacts, Pool, PoolFacts, State

FACTS: dict[str, Any] = {"max_model_len": 100, "kv_blocks": 1, "block_size": 16, "max_num_seqs": 4, "placement": 1}


def member(id: str, outstanding=0, digest="d", state=State.READY, suspect=False, **facts: Any) -> Member:
    model = ModelFacts(name="m", digest=digest, layers=1, moe_layers=(0,), experts=4, top_k=2)
    attention = AttentionFacts.model_validate(FACTS | {"outstanding_tokens": outstanding} | facts)
    beat = Heartbeat(kind=Kind.ATTENTION, id=id, incarnation=1, state=state, node="n", model=model, attention=attention)
    return Member(beat, 0.0, suspect)


def order(*members, **own):
    return [m.id for m in ranked(members, "d", own)]


def test_fewest_outstanding_tokens_first_ties_by_id():
    """Worked example: b has 5 + 10 of our own, c has 20, a and d have 12."""
    assert order(member("b", 5), member("c", 20), member("d", 12), member("a", 12), b=10) == ["a", "d", "b", "c"]


def test_unusable_instances_are_left_out():
    unusable = [
        member("other", digest="x"),
        member("starting", state=State.STARTING),
        member("draining", state=State.DRAINING),
        member("unplaced", placement=0),
        member("stalled", stalled=True),
    ]
    assert order(*unusable, member("ok")) == ["ok"]
    assert order(member("monolith", placement=0, monolith=True)) == ["monolith"]
    for one in unusable:
        reason = why_not(one, "d", may_wait=False)
        assert reason and one.id in reason


def scheduler(*pools: PoolFacts) -> Member:
    return Member(Heartbeat(kind=Kind.SCHEDULER, id="s", incarnation=1, state=State.READY, node="n", pools=pools), 0.0)


def test_requests_wait_for_experts_only_while_somebody_sees_to_their_pool():
    waits = [member("unplaced", placement=0), member("stalled", stalled=True)]
    experts = PoolFacts(pool=Pool.EXPERTS, desired=0)
    assert order(scheduler(experts), *waits, member("other", digest="x")) == ["stalled", "unplaced"]
    busy = member("works", outstanding=1000)
    assert order(scheduler(experts), *waits, busy) == ["works", "stalled", "unplaced"]
    for nobody in (PoolFacts(pool=Pool.ATTENTION, desired=1), experts.model_copy(update={"problem": "no permission"})):
        assert order(scheduler(nobody), *waits) == []
        reason = not_ready([scheduler(nobody), *waits], "d")
        assert reason == "unplaced has no placement of experts yet; stalled waits for an expert home"
    assert not_ready([scheduler()], "d") == "no attention instance is in the mesh"


def test_silent_instances_come_last():
    assert order(member("a", suspect=True), member("b", 1000)) == ["b", "a"]


def test_the_context_is_what_everyone_takes():
    assert context_length([member("a"), member("b", max_model_len=50)], "d") == 50
    assert context_length([member("a", digest="x")], "d") is None
