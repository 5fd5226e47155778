"""Which attention instance gets a request: pure, from the heartbeats and this gateway's own load.

Sending is in router.py.
"""

from collections.abc import Iterable, Mapping

from shared.membership import Member


def usable(members: Iterable[Member], digest: str) -> list[Member]:
    """READY attention instances of this model that have all the experts they need."""
    return [m for m in members if why_not(m, digest) is None]


def why_not(member: Member, digest: str) -> str | None:
    """Why an instance gets no requests, in words; None when it does."""
    beat = member.heartbeat
    if beat.model is None or beat.model.digest != digest:
        return f"{member.id} serves another model"
    if not member.ready or beat.attention is None:
        return f"{member.id} is {beat.state.value}" + (f" ({beat.detail})" if beat.detail else "")
    if beat.attention.placement == 0 and not beat.attention.monolith:
        return f"{member.id} has no placement of experts yet"
    return f"{member.id} waits for an expert home" if beat.attention.stalled else None


def ranked(members: Iterable[Member], digest: str, own_load: Mapping[str, int]) -> list[Member]:
    """Usable instances, best first: fewest outstanding tokens, ties to the lowest id; silent ones last.

    Args:
        own_load: instance id -> tokens of this gateway's open requests there, which heartbeats may not show yet.
    """

    def key(member: Member) -> tuple[bool, int, str]:
        facts = member.heartbeat.attention
        reported = facts.outstanding_tokens if facts else 0
        return member.suspect, reported + own_load.get(member.id, 0), member.id

    return sorted(usable(members, digest), key=key)


def context_length(members: Iterable[Member], digest: str) -> int | None:
    """Longest sequence that every usable instance takes, in tokens; None when there is no instance."""
    return min(
        (m.heartbeat.attention.max_model_len for m in usable(members, digest) if m.heartbeat.attention),
        default=None,
    )
