"""What a recorder and attention instances say to each other over NATS: leases, and records of routing.

The recorder is recorder.py, the other side services/attention/reports.py.
"""

from typing import Annotated

from pydantic import Field

from shared.messages import U64, Message, Subjects

LONGEST_LEASE_S = 30.0


class TraceLease(Message):
    """Recorder -> all attention instances, published again and again: send the routing of your exchanges.

    A recorder that dies asks no more, and recording ends with its lease.
    """

    recorder: Annotated[str, Field(min_length=1, max_length=64)]
    seconds: Annotated[float, Field(ge=0, le=LONGEST_LEASE_S)]
    """From receipt; 0: no longer."""


class RoutingTrace(Message):
    """Attention -> all recorders, published: what the rows of the latest exchanges have chosen."""

    attention: str
    incarnation: U64
    records: bytes
    """As in a file of shared/traces/native.py, without its header; a step has the same 64-bit number on all instances
    that run it, and no other one has. Empty: a sign of life."""
    seen: U64
    """Exchanges to be recorded since the start of the instance, up to these: more than have come are lost."""
    started: str = ""
    """Recorder whose first lease, or first one after a pause, has just come."""
    ended: tuple[str, ...] = ()
    """Recorders whose leases ended before this message: they have everything."""


def leases(subjects: Subjects) -> str:
    """Subject of TraceLease."""
    return f"{subjects.prefix}.trace.lease"


def routing(subjects: Subjects) -> str:
    """Subject of RoutingTrace."""
    return f"{subjects.prefix}.trace.routing"
