"""What the compute thread tells the rest of the process: one immutable snapshot after every turn.

Covers the numbers only; heartbeats are made in server.py, the text of /metrics in shared/telemetry.py.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from services.attention.batching import Limits
from services.attention.exchange import Exchange
from services.attention.pending import ExchangeStats
from services.attention.ways import Row
from shared.messages import AttentionFacts, WayFacts
from shared.metrics import Buckets, Sample, sample

MOST_WAYS = 32
"""Lines of the cost table in a heartbeat, the newest."""
NO_EXPERTS_GRACE_S = 5.0
"""Experts may be away for so long before new requests are refused: a restart of one of them takes seconds."""


@dataclass(frozen=True, slots=True)
class EngineStats:
    """Gauges of this moment and counters since the start."""

    waiting: int = 0
    running: int = 0
    outstanding_tokens: int = 0
    kv_blocks_used: int = 0
    placement: int = 0
    """Version in use; 0 while there is none."""
    unready_since: float | None = -math.inf
    """Monotonic time since when some expert has no home that answers; None: all have."""
    stalled: bool = False
    """Requests wait because experts do not answer."""
    unacknowledged: int = 0
    """Requests whose output a gateway has not acknowledged to the end."""
    steps: int = 0
    split_steps: int = 0
    """Those with more than one micro-batch."""
    prompt_tokens: int = 0
    """Rows computed in prefill, repeats after a preemption included."""
    reused_tokens: int = 0
    """Found in the prefix cache."""
    generated_tokens: int = 0
    preemptions: int = 0
    finished: Mapping[str, int] = field(default_factory=dict)
    """By finish reason; errors as their code."""

    def without_experts(self, now: float) -> bool:
        """True when new requests had better go elsewhere; ``now`` in monotonic seconds."""
        return self.unready_since is not None and now - self.unready_since > NO_EXPERTS_GRACE_S


def facts(stats: EngineStats, limits: Limits, now: float, exchange: Exchange, monolith: bool = False) -> AttentionFacts:
    """The heartbeat's part about this instance."""
    return AttentionFacts(
        max_model_len=limits.max_model_len,
        kv_blocks=limits.kv_blocks,
        block_size=limits.block_size,
        max_num_seqs=limits.max_num_seqs,
        placement=stats.placement,
        waiting=stats.waiting,
        running=stats.running,
        outstanding_tokens=stats.outstanding_tokens,
        kv_blocks_used=stats.kv_blocks_used,
        stalled=stats.stalled or stats.without_experts(now),
        monolith=monolith,
        address=exchange.address,
        ways=tuple(way_facts(row) for row in exchange.ways()[-MOST_WAYS:]),
    )


def way_facts(row: Row) -> WayFacts:
    return WayFacts(
        rows=row.rows, members=row.members, way=str(row.way), predicted_s=row.predicted, measured_s=row.measured,
        chosen=row.chosen,
    )  # fmt: skip


def samples(stats: EngineStats, limits: Limits, step_seconds: Buckets, refused: Mapping[str, int]) -> Iterator[Sample]:
    """Everything for /metrics but the exchange."""
    yield sample("running", stats.running)
    yield sample("waiting", stats.waiting)
    yield sample("kv_blocks", limits.kv_blocks)
    yield sample("kv_blocks_used", stats.kv_blocks_used)
    yield sample("placement_version", stats.placement)
    yield sample("steps", stats.steps)
    yield sample("split_steps", stats.split_steps)
    yield sample("step_seconds", step_seconds)
    yield sample("prompt_tokens", stats.prompt_tokens)
    yield sample("prefix_cache_tokens", stats.reused_tokens)
    yield sample("generated_tokens", stats.generated_tokens)
    yield sample("preemptions", stats.preemptions)
    for outcome, count in stats.finished.items():
        yield sample("requests", count, outcome=outcome)
    for code, count in refused.items():
        yield sample("refused", count, code=code)


def exchange_samples(stats: ExchangeStats) -> Iterator[Sample]:
    """The data plane as attention sees it."""
    yield sample("exchange_seconds", stats.seconds)
    yield sample("exchange_express", stats.express)
    yield sample("exchange_bytes", stats.bytes_sent, direction="sent")
    yield sample("exchange_bytes", stats.bytes_received, direction="received")
    for reason, count in stats.repeats.items():
        yield sample("exchange_repeats", count, reason=reason)
    for reason, count in stats.dropped.items():
        yield sample("frames_dropped", count, reason=reason)


def way_samples(table: Sequence[Row], formed: int, broken: int) -> Iterator[Sample]:
    """The cost table, and groups."""
    yield sample("groups", formed, outcome="formed")
    yield sample("groups", broken, outcome="broken")
    for row in table:
        labels = {"rows": str(row.rows), "members": str(row.members), "way": str(row.way)}
        yield sample("way_chosen", row.chosen, **labels)
        yield sample("way_predicted_seconds", row.predicted, **labels)
        if row.measured is not None:
            yield sample("way_measured_seconds", row.measured, **labels)
