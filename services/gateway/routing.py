"""Which attention instance gets a request: pure, from the heartbeats and this gateway's own load.

``members`` is everybody: schedulers say whether requests may wait for experts. Sending is in router.py.
"""

from collections.abc import Iterable, Mapping

from shared.membership import Member
from shared.messages import Kind, Pool


def experts_are_seen_to(members: Iterable[Member]) -> bool:
    """Whether a scheduler makes the pool of experts as large as somebody has asked: requests then wait for experts."""
    facts = (fact for m in members if m.ready for fact in m.heartbeat.pools)
    return any(fact.pool is Pool.EXPERTS and not fact.problem for fact in facts)


def usable(members: Iterable[Member], digest: str) -> list[Member]:
    """READY attention instances of this model that have all the experts they need, or may wait for them."""
    members = list(members)
    may_wait = experts_are_seen_to(members)
    return [m for m in members if m.heartbeat.kind is Kind.ATTENTION and why_not(m, digest, may_wait) is None]


def not_ready(members: Iterable[Member], digest: str) -> str | None:
    """Why no request can be served now, for a person; None when one can."""
    members = list(members)
    if usable(members, digest):
        return None
    reasons = [why_not(m, digest, may_wait=False) for m in members if m.heartbeat.kind is Kind.ATTENTION]
    return "; ".join(filter(None, reasons)) or "no attention instance is in the mesh"


def why_not(member: Member, digest: str, may_wait: bool) -> str | None:
    """Why an attention instance gets no requests, in words; None when it does.

    Args:
        may_wait: for experts, if there are none.
    """
    beat = member.heartbeat
    if beat.model is None or beat.model.digest != digest:
        return f"{member.id} serves another model"
    if not member.ready or beat.attention is None:
        return f"{member.id} is {beat.state.value}" + (f" ({beat.detail})" if beat.detail else "")
    if may_wait:
        return None
    if beat.attention.placement == 0 and not beat.attention.monolith:
        return f"{member.id} has no placement of experts yet"
    return f"{member.id} waits for an expert home" if beat.attention.stalled else None


def ranked(members: Iterable[Member], digest: str, own_load: Mapping[str, int]) -> list[Member]:
    """Usable instances, best first: fewest outstanding tokens, ties to the lowest id; silent ones last.

    Those that would wait for experts come after all others.

    Args:
        own_load: instance id -> tokens of this gateway's open requests there, which heartbeats may not show yet.
    """

    def key(member: Member) -> tuple[bool, bool, int, str]:
        facts = member.heartbeat.attention
        reported = facts.outstanding_tokens if facts else 0
        waits = why_not(member, digest, may_wait=False) is not None
        return waits, member.suspect, reported + own_load.get(member.id, 0), member.id

    return sorted(usable(members, digest), key=key)


def context_length(members: Iterable[Member], digest: str) -> int | None:
    """Longest sequence that every usable instance takes, in tokens; None when there is no instance."""
    return min(
        (m.heartbeat.attention.max_model_len for m in usable(members, digest) if m.heartbeat.attention),
        default=None,
    )
