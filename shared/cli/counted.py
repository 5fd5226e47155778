"""What the instances of a mesh have counted, from their metrics, once all of them take part."""

import re
import time
from collections.abc import Sequence
from dataclasses import dataclass

import httpx

from shared.changes import Phase, PlacementRecord
from shared.cli.mesh import LocalMesh, MeshOptions
from shared.cli.status import look
from shared.errors import MoemeshError
from shared.membership import Member
from shared.messages import Kind

LONGEST_START_S = 120.0
"""Until all instances of a mesh take part."""


class NotMeasured(MoemeshError):
    """A batch did not decode long enough together, or was refused."""


@dataclass(frozen=True)
class Counts:
    """What the instances of a mesh have counted, summed over each pool."""

    exchanges: float
    """As attention instances count them: those of a group count for each member."""
    exchange_s: float
    answers: float
    """Of expert instances to exchanges; those of a group count once."""
    compute_s: float
    activations: float
    modelled_s: float
    """Of paced instances: what their work should have taken,"""
    late_s: float
    """and what it took longer."""

    def __sub__(self, before: "Counts") -> "Counts":
        pairs = zip(vars(self).values(), vars(before).values(), strict=True)
        return Counts(*(a - b for a, b in pairs))


@dataclass(frozen=True)
class Pages:
    """Where the instances of a mesh show their metrics."""

    attention: tuple[str, ...]
    experts: tuple[str, ...]

    @classmethod
    async def of(cls, mesh: LocalMesh) -> "Pages":
        """Waits until all instances take part. Raises NotMeasured after LONGEST_START_S seconds."""
        give_up = time.monotonic() + LONGEST_START_S
        while True:
            members, record = await look(mesh.nats_url, mesh.options.mesh)
            if complete(mesh.options, members, record):
                urls = {kind: tuple(m.heartbeat.url for m in members if m.heartbeat.kind is kind) for kind in Kind}
                return cls(urls[Kind.ATTENTION], urls[Kind.EXPERTS])
            if time.monotonic() > give_up:
                states = ", ".join(f"{m.id} {m.heartbeat.state}" for m in members)
                raise NotMeasured(f"not all instances took part within {LONGEST_START_S:g} s: {states}")

    async def read(self, client: httpx.AsyncClient) -> Counts:
        """As of now."""
        attention, experts = [
            "".join([(await client.get(url + "/metrics")).text for url in urls])
            for urls in (self.attention, self.experts)
        ]
        return Counts(
            exchanges=total(attention, "exchange_seconds_count"),
            exchange_s=total(attention, "exchange_seconds_sum"),
            answers=total(experts, "answers_total"),
            compute_s=total(experts, "compute_seconds_total"),
            activations=total(experts, "expert_activations_total"),
            modelled_s=total(attention + experts, "paced_seconds_total"),
            late_s=total(attention + experts, "paced_late_seconds_total"),
        )


def complete(options: MeshOptions, members: Sequence[Member], record: PlacementRecord | None) -> bool:
    """Whether every instance is READY and every expert instance has experts, and nothing is about to change."""
    ready = [member.heartbeat.kind for member in members if member.ready]
    if [ready.count(kind) for kind in (Kind.ATTENTION, Kind.EXPERTS)] != [options.attention, options.experts]:
        return False
    if record is None or record.committed is None:
        return False
    return record.phase is Phase.SETTLED and len(record.committed.instances) == options.experts


def total(text: str, metric: str) -> float:
    """A metric of /metrics pages, summed over its labels."""
    return sum(float(value) for value in re.findall(rf"^moemesh_{metric}(?:\{{.*\}})? (\S+)$", text, re.MULTILINE))
