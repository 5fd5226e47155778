"""Open exchanges and the sorting of frames that arrive for them: kept where they are awaited, else dropped and counted.

Knows no time-outs and sends nothing; mesh_exchange.py decides what follows from a reply that is missing.
"""

import math
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from services.attention.groups import Group
from services.attention.replies import PART_BYTES, Reply
from services.attention.targets import Targets
from services.attention.ways import SOLO, Phase, Way
from shared.errors import BadFrame
from shared.exchange_frames import Routes, read_segments
from shared.metrics import Buckets
from shared.telemetry import NO_TRACE
from shared.transport.base import DTYPES, FrameKind, Header, Incoming, Refusal

LONGEST_PAUSE_S = 0.1


@dataclass
class ExchangeStats:
    """Counters since the start; seconds, and bytes of rows and meta."""

    exchanges: int = 0
    express: int = 0
    """Of these, how many without the interpreter."""
    unavailable: int = 0
    waited: float = 0.0
    seconds: Buckets = field(default_factory=Buckets)
    """From dispatch to the last combined part; not copied."""
    bytes_sent: int = 0
    bytes_received: int = 0
    repeats: Counter[str] = field(default_factory=Counter)
    """By reason: deadline, connection, digest, parts, refusal."""
    refusals: Counter[str] = field(default_factory=Counter)
    """By name of the refusal."""
    dropped: Counter[str] = field(default_factory=Counter)
    """Replies thrown away: late, duplicate, foreign, malformed."""
    suspected: Counter[str] = field(default_factory=Counter)
    """Suspicions by instance id."""

    def copy(self) -> "ExchangeStats":
        return replace(
            self,
            repeats=self.repeats.copy(),
            refusals=self.refusals.copy(),
            dropped=self.dropped.copy(),
            suspected=self.suspected.copy(),
        )


LEADER = 1 << 64
"""In ``Pending.missing``: the group's leader. No instance has this bit."""


@dataclass(slots=True)
class Pending:
    """One exchange between dispatch and the end of combine. Masks are bits of the placement."""

    layer: int
    sequence: int
    rows: Tensor
    """[T, hidden]; what is asked about. Kept for repeats."""
    started: float
    """Monotonic time of the dispatch."""
    give_up: float
    """Monotonic time after which nothing is repeated."""
    patience: float
    """Seconds until the next deadline."""
    pause: float
    """Seconds before a refused dispatch is repeated."""
    live: int = 0
    asked: int = 0
    missing: int = 0
    """Those of ``asked`` that have not answered."""
    deadline: float = 0.0
    attempt: int = 0
    floor: int = 0
    """Replies to attempts floor..attempt are wanted: all were asked with the same live mask."""
    retry_at: float = math.inf
    refused: int = 0
    refused_before: int = 0
    problem: str = ""
    """What went wrong last, for a person."""
    fatal: bool = False
    """Refused for good: a repeat cannot help."""
    disagreements: int = 0
    trace: tuple[bytes, bytes] = NO_TRACE
    replies: dict[int, Reply] = field(default_factory=dict)
    """By the lowest bit of those whose parts are in it."""
    prefill: bool = False
    """Some of these rows are of a step that computes prompts."""
    way: Way = SOLO
    group: Group | None = None
    """Whose rows these are; None: of this instance alone."""
    mine: Tensor | None = None
    """The caller's rows, when ``rows`` are those of all members."""
    leader: int = 0
    """Incarnation of who asks the experts for us; 0: we do."""
    sums: Incoming | None = None
    """The leader's answer."""
    routes: Routes | None = None
    """Set when the gate is on this side."""
    digest: int = 0

    @property
    def depends(self) -> bool:
        """True: other members must do their part, else there is no answer."""
        return self.group is not None and (self.leader != 0 or self.way.phase is Phase.ONE)

    @property
    def simple(self) -> bool:
        """True: a repeat would be the same; else it goes without other members and without relays."""
        return not self.depends and self.way.phase is not Phase.RELAY

    def straight(self) -> "Pending":
        """The same exchange without relays."""
        return replace(self, way=self.way.straight())

    def forget_replies(self) -> None:
        for reply in self.replies.values():
            reply.frame.release()
        self.replies.clear()
        if self.sums is not None:
            self.sums.release()
            self.sums = None


class Inbox:
    """Frames find their exchange here.

    Args:
        mesh: hash of mesh name and model digest.
        hidden: columns of a reply's rows.
        elsewhere: takes frames that belong to no exchange, and returns why it drops them.
    """

    def __init__(
        self,
        targets: Targets,
        stats: ExchangeStats,
        mesh: int,
        hidden: int,
        elsewhere: Callable[[Incoming], str] = lambda incoming: "unexpected",
    ) -> None:
        self.open: dict[int, Pending] = {}
        """By sequence."""
        self._targets = targets
        self._stats = stats
        self._mesh = mesh
        self._hidden = hidden
        self._elsewhere = elsewhere

    def take(self, incoming: Incoming) -> None:
        """Keep the frame as a reply, note it as a refusal, or drop and count it."""
        reason = self._sort(incoming)
        if reason:
            self._stats.dropped[reason] += 1
            incoming.release()

    def _sort(self, incoming: Incoming) -> str:
        """The reason to drop a frame, "" when it was taken."""
        header = incoming.header
        if header.mesh != self._mesh:
            return "foreign"
        if header.kind == FrameKind.SUM:
            return self._sums(incoming)
        if header.kind not in (FrameKind.COMBINE, FrameKind.REFUSAL):
            return self._elsewhere(incoming)
        bit = self._targets.bit(header.sender)
        if not bit:
            return "foreign"
        pending = self.open.get(header.sequence)
        if header.kind == FrameKind.REFUSAL:
            return self._refusal(pending, bit, incoming)
        return self._reply(pending, bit, incoming)

    def _reply(self, pending: Pending | None, bit: int, incoming: Incoming) -> str:
        header = incoming.header
        try:
            segments = read_segments(header, incoming.meta, bit.bit_length() - 1)
        except BadFrame:
            return "malformed"
        if not self._well_formed(header):
            return "malformed"
        self._targets.trust(header.sender)
        if pending is None or not pending.floor <= header.attempt <= pending.attempt:
            return "late"
        bits = bit if not header.flags else sum({1 << number for number, _ in segments})
        if bits & ~pending.missing:
            return "duplicate"
        pending.missing &= ~bits
        pending.replies[bits & -bits] = Reply(incoming, segments)
        self._stats.bytes_received += header.row_bytes + header.meta_bytes
        return ""

    def _sums(self, incoming: Incoming) -> str:
        header = incoming.header
        pending = self.open.get(header.sequence)
        if pending is None or pending.leader != header.sender or not pending.missing:
            return "late"
        if (header.rows, header.columns) != (len(pending.rows), self._hidden):
            return "malformed"
        pending.missing, pending.sums = 0, incoming
        return ""

    def _refusal(self, pending: Pending | None, bit: int, incoming: Incoming) -> str:
        if pending is None or incoming.header.attempt != pending.attempt:
            return "late"
        if not pending.missing & bit & ~pending.refused:
            return "duplicate"
        try:
            code = Refusal(int(incoming.meta[0]))
        except (IndexError, ValueError):
            return "malformed"
        self._stats.refusals[code.name.lower()] += 1
        text = bytes(incoming.meta[1:]).decode(errors="replace")
        incoming.release()
        pending.problem = f"{code.name.lower()}: {text}"
        pending.fatal = pending.fatal or (code is Refusal.BAD_REQUEST and pending.simple)
        pending.refused |= bit
        pending.retry_at = min(pending.retry_at, time.monotonic() + pending.pause)
        pending.pause = min(2 * pending.pause, LONGEST_PAUSE_S)
        return ""

    def _well_formed(self, header: Header) -> bool:
        return (
            header.columns == self._hidden
            and DTYPES[header.dtype] is torch.float32
            and header.meta_bytes >= header.rows * PART_BYTES
        )
