"""The attempts at one exchange: rows out, replies awaited up to deadlines, repeats, and the sum of what agrees.

Ends with the answer or with ExchangeUnavailable. What happens between steps, and which frame belongs to which
exchange, is decided elsewhere (mesh_exchange.py, pending.py).
"""

import math
import time
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from services.attention.lockstep import Lockstep
from services.attention.pending import LEADER, ExchangeStats, Pending
from services.attention.replies import Sum
from services.attention.sending import Sender
from services.attention.targets import Targets
from services.attention.ways import APART, Gate, Phase
from shared.errors import ExchangeUnavailable
from shared.models.scratch import Scratch

MAX_DISAGREEMENTS = 3
MOST_QUEUED = 1000
LONGEST_PATIENCE = 8  # deadlines: doubling ends there
SLICE_S = 0.05  # how often a waiting exchange looks whether a connection broke


class Receive(Protocol):
    def __call__(self, timeout: float, busy: bool = True, together: int = 1) -> bool:
        """Sort in one frame, or wake up for ``together``; False when none came within ``timeout`` seconds."""
        ...


@dataclass
class Foreseen:
    """What the next step will use; set by another thread."""

    members: frozenset[int] | None = None
    """Incarnations that are there; None: unknown."""
    version: int = 0
    """Of the placement."""


class Attempts:
    """Carries exchanges through. Belongs to the compute thread, but for ``foreseen``.

    Args:
        incarnation: of this process.
        dtype: in which members give their rows to the group's leader.
        deadline: see ``MeshExchange``.
        give_up: seconds; said when an exchange ends for it.
    """

    def __init__(
        self,
        targets: Targets,
        sender: Sender,
        lockstep: Lockstep,
        sums: Sum,
        stats: ExchangeStats,
        scratch: Scratch,
        receive: Receive,
        *,
        incarnation: int,
        dtype: torch.dtype,
        deadline: float,
        give_up: float,
    ) -> None:
        self._targets, self._sender, self._lockstep = targets, sender, lockstep
        self._sum, self._stats, self._scratch, self._receive = sums, stats, scratch, receive
        self._incarnation, self._dtype = incarnation, dtype
        self._deadline, self._give_up = deadline, give_up
        self.foreseen = Foreseen()

    def begin(self, pending: Pending) -> None:
        """Send the rows on their way. Raises ExchangeUnavailable."""
        self._join_rows(pending)
        if pending.leader:
            pending.missing = LEADER
            self._set_deadline(pending)
        else:
            self._aim(pending)
            self._sender.send(pending, pending.asked)

    def resume(self, pending: Pending) -> None:
        """The rows are on their way already, to all that are asked. Raises ExchangeUnavailable."""
        self._aim(pending)

    def _join_rows(self, pending: Pending) -> None:
        """Give our rows to the group's leader, or collect those of all members if that is us."""
        group = self._lockstep.group
        if group is None or pending.way == APART:
            pending.way = pending.way.straight() if pending.way.phase is Phase.ONE else pending.way
            return
        pending.group = group
        if pending.way.phase is Phase.ONE:
            return
        if group.leader != self._incarnation:
            pending.leader = group.leader
            self._lockstep.send_rows(group, pending.sequence, pending.layer, pending.rows, pending.prefill)
            return
        whole = self._scratch.rows("rows", group.total, pending.rows.shape[1], self._dtype)
        if self._lockstep.collect(group, pending.layer, pending.rows, whole, pending.started + self._deadline):
            pending.mine, pending.rows = pending.rows, whole
            pending.prefill = pending.prefill or self._lockstep.prefills(group, pending.layer)
        else:
            self._stats.repeats["group"] += 1
            self._part(pending)

    def finish(self, pending: Pending, x: Tensor) -> None:
        """Return when all replies are here, agree and are added to ``x``. Raises ExchangeUnavailable."""
        while True:
            while pending.missing:
                self._wait(pending)
            reason = self._add(pending, x)
            if not reason:
                return
            self._disagree(pending, reason)

    def _wait(self, pending: Pending) -> None:
        """Until one frame, the retry of a refusal or the deadline; acts on the latter two."""
        due = min(pending.deadline, pending.retry_at)
        together = 1 if pending.leader or pending.way.phase is Phase.RELAY else pending.missing.bit_count()
        received = self._receive(min(due - time.monotonic(), SLICE_S), together=together)
        now = time.monotonic()
        if now >= pending.deadline:
            self._catch_up()
        if pending.fatal:
            raise self._unavailable(pending, pending.refused)
        if not pending.missing:
            return
        if pending.depends and self._lockstep.group is not pending.group:
            self._again(pending, 0, "group")
        elif now >= pending.deadline:
            self._overdue(pending, now)
        elif now >= pending.retry_at:
            self._retry_refused(pending)
        elif not received:
            self._look_for_dead(pending)

    def _catch_up(self) -> None:
        """Take what has arrived already: it is this process that was late. Bounded, for frames may come without end."""
        for _ in range(MOST_QUEUED):
            if not self._receive(0.0):
                return

    def _add(self, pending: Pending, x: Tensor) -> str:
        """Add all parts to ``x``. Returns why that cannot be, "" when it is done."""
        if pending.sums is not None:
            x += pending.sums.rows.to(x.dtype)
            return ""
        replies = list(pending.replies.values())
        if len({reply.frame.header.digest for reply in replies}) > 1:
            pending.problem = "replicas were chosen differently"
            return "digest"
        leads = pending.mine is not None
        total = self._scratch.rows("sums", len(pending.rows), x.shape[1], torch.float32).zero_() if leads else x
        problem = self._sum.add(replies, self._targets.homes[pending.layer], total)
        pending.problem = problem or pending.problem
        if not problem and leads:
            self._hand_out(pending, total, x)
        return "parts" if problem else ""

    def _hand_out(self, pending: Pending, total: Tensor, x: Tensor) -> None:
        """The sums [T, H] of all members' rows to whom they belong."""
        group = pending.group
        assert group is not None
        self._lockstep.scatter(group, pending.layer, total)
        x += total[group.first(self._incarnation) :][: len(x)].to(x.dtype)

    # ---- trouble ----------------------------------------------------------------------------------------

    def _overdue(self, pending: Pending, now: float) -> None:
        if pending.depends or pending.way.phase is Phase.RELAY:
            self._again(pending, 0, "group" if pending.depends else "relay")
            return
        self._suspect(pending.missing)
        if now >= pending.give_up:
            pending.problem = pending.problem or f"no answer within {self._give_up:g} s"
            raise self._unavailable(pending, pending.missing)
        pending.patience = min(2 * pending.patience, LONGEST_PATIENCE * self._deadline)
        self._again(pending, pending.missing, "deadline")

    def _retry_refused(self, pending: Pending) -> None:
        placement = self._targets.placement
        if placement and self.foreseen.version > placement.version:
            pending.problem = f"placement {self.foreseen.version} has taken its place"
            raise self._unavailable(pending, pending.refused)
        refused, pending.refused, pending.retry_at = pending.refused, 0, math.inf
        if refused & pending.refused_before:
            self._suspect(refused)
        pending.refused_before |= refused
        self._again(pending, refused, "refusal")

    def _look_for_dead(self, pending: Pending) -> None:
        if pending.leader:
            if self._lockstep.lost(pending.leader):
                self._again(pending, 0, "group")
            return
        lost = self._targets.unreachable(pending.missing, self.foreseen.members)
        if lost:
            self._stats.suspected.update(self._targets.names(lost))
            self._targets.lose(lost)
        gone = pending.missing & ~self._targets.live  # also those that another open exchange found dead
        if not gone:
            return
        if not self._targets.asked(pending.layer):
            pending.problem = "gone or silent, and some experts have no other home"
            raise self._unavailable(pending, gone)
        self._again(pending, gone, "connection")

    def _disagree(self, pending: Pending, reason: str) -> None:
        pending.disagreements += 1
        if pending.disagreements >= MAX_DISAGREEMENTS:
            raise self._unavailable(pending, pending.asked)
        self._again(pending, pending.asked, reason, afresh=True)

    def _again(self, pending: Pending, mask: int, reason: str, afresh: bool = False) -> None:
        """Ask ``mask`` again; everybody when the live mask changed or ``afresh``, then old replies are void."""
        self._stats.repeats[reason] += 1
        pending.attempt += 1
        if pending.depends:
            self._part(pending)
            afresh = True
        if pending.way.phase is Phase.RELAY:  # a repeat never depends on another instance
            pending.way = pending.way.straight()
            afresh = True
        if self._targets.live != pending.live:
            pending.patience = self._deadline
            afresh = True
        if afresh:
            self._aim(pending)
            mask = pending.asked
        elif reason == "deadline":
            self._set_deadline(pending)
        self._sender.hello(self._targets.peers(mask))
        self._sender.send(pending, mask)

    def _part(self, pending: Pending) -> None:
        """Leave the group, and go on with our own rows alone until the step ends."""
        self._lockstep.leave()
        pending.group, pending.leader = None, 0
        pending.rows, pending.mine = pending.rows if pending.mine is None else pending.mine, None
        pending.way = pending.way.straight()

    def _aim(self, pending: Pending) -> None:
        """Point the exchange at the instances that are live now; nobody has answered yet."""
        pending.forget_replies()
        pending.live = pending.group.live if pending.depends and pending.group else self._targets.live
        pending.asked = self._targets.asked(pending.layer, pending.live)
        if not pending.asked:
            raise self._unavailable(pending, pending.missing)
        if pending.way.gate is Gate.ATTENTION:
            self._sender.route(pending)
        pending.missing = pending.asked
        pending.floor = pending.attempt
        pending.refused, pending.retry_at = 0, math.inf
        self._set_deadline(pending)

    def _set_deadline(self, pending: Pending) -> None:
        pending.deadline = min(time.monotonic() + pending.patience, pending.give_up)

    def _suspect(self, mask: int) -> None:
        self._stats.suspected.update(self._targets.names(mask))
        self._targets.suspect(mask)

    def _unavailable(self, pending: Pending, mask: int) -> ExchangeUnavailable:
        return ExchangeUnavailable(pending.layer, self._targets.names(mask), pending.problem)
