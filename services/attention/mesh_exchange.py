"""The exchange over a transport: send, wait with deadlines, repeat, verify, sum.

Who is live is decided in targets.py, who runs a step together in lockstep.py, which way rows go in ways.py; what is
sent to experts is sending.py's, which frame belongs to which exchange pending.py's, what replies contain replies.py's.
"""

import math
import time
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor

from services.attention.exchange import Handle, View
from services.attention.links import LinkMeter, WayChoice
from services.attention.lockstep import Lockstep, Standing
from services.attention.pending import LEADER, ExchangeStats, Inbox, Pending
from services.attention.replies import Sum
from services.attention.sending import Sender
from services.attention.stats import exchange_samples, way_samples
from services.attention.tap import RoutingTap
from services.attention.targets import Targets
from services.attention.ways import Gate, Phase, Row, Ways
from shared.errors import ExchangeUnavailable
from shared.kernels.base import Kernels
from shared.metrics import Sample
from shared.models.moe import ExpertLayer
from shared.models.scratch import Scratch
from shared.telemetry import NO_TRACE
from shared.transport.base import FrameKind, Incoming, Transport

CPU = torch.device("cpu")
MAX_DISAGREEMENTS = 3
MOST_QUEUED = 1000
LONGEST_PATIENCE = 8  # deadlines: doubling ends there
SLICE_S = 0.05  # how often a waiting exchange looks whether a connection broke


class MeshExchange:
    """See ``Exchange``. Belongs to the compute thread, but for ``wake``, ``foresee``, ``stats`` and ``samples``.

    Args:
        mesh: hash of mesh name and model digest (shared/activation.py).
        incarnation: of this process.
        deadline: seconds to wait for replies before an exchange is repeated; doubles, up to eightfold, with
            every fruitless repeat.
        give_up: seconds after which an exchange ends with ExchangeUnavailable; 0: three deadlines.
        pause: seconds before a refused dispatch is repeated; doubles up to 0.1 s.
        device: of the rows.
        max_rows: of an exchange.
        gates: of every layer, for ways with the gate on this side.
        ways: how exchanges may go.
        group_wait: share of a step for which a group waits for its members; 0: no groups.
        tap: follows what rows choose.
    """

    def __init__(
        self,
        transport: Transport,
        kernels: Kernels,
        *,
        hidden: int,
        dtype: torch.dtype,
        top_k: int,
        mesh: int,
        incarnation: int,
        deadline: float = 2.0,
        give_up: float = 0.0,
        pause: float = 0.005,
        device: torch.device = CPU,
        max_rows: int = 512,
        gates: Mapping[int, ExpertLayer] | None = None,
        ways: Ways | None = None,
        group_wait: float = 0.0,
        tap: RoutingTap | None = None,
    ) -> None:
        self._transport = transport
        self._hidden, self._dtype = hidden, dtype
        self._incarnation = incarnation
        self._deadline, self._pause = deadline, pause
        self._give_up = give_up or 3 * deadline
        self._targets = Targets(transport)
        self._stats = ExchangeStats()
        self._inbox = Inbox(self._targets, self._stats, mesh, hidden, self._take_other)
        self._sum = Sum(kernels, top_k)
        signed = {"mesh": mesh, "incarnation": incarnation}
        self._sender = Sender(transport, self._targets, gates or {}, self._stats, dtype=dtype, **signed)
        self._meter = LinkMeter(transport, hidden=hidden, max_rows=max_rows, pump=self._receive, **signed)
        self._choice = WayChoice(ways or Ways(Phase.DIRECT, Gate.EXPERTS), self._targets, self._meter, hidden, top_k)
        self._lockstep = Lockstep(
            transport, max_rows=max_rows, share=group_wait, pump=self._receive, choose=self._choice.choose, **signed
        )
        self._scratch = Scratch(device)
        self._repeats = 0
        self._tap = tap
        self._sequence = 0
        self._probe_at = 0.0
        self._members: frozenset[int] | None = None
        self._foreseen = 0  # version of the placement that the next step will use

    @property
    def address(self) -> bytes:
        return self._transport.address

    def warm_up(self, layer: int, x: Tensor) -> None:
        self._sum.warm_up(x)
        self._sender.warm_up(layer, x)

    def foresee(self, view: View) -> None:
        self._members = frozenset(instance.incarnation for instance in view.instances.values())
        self._foreseen = view.placement.version if view.placement else 0

    # ---- between steps ----------------------------------------------------------------------------------

    def update(self, view: View) -> None:
        self.abandon()
        newcomers = self._targets.update(view)
        if newcomers:
            self._sender.hello(newcomers)
        self._choice.update(self._lockstep.meet(view.neighbours))

    def use(self, ways: Ways) -> None:
        """Another cost table, or fixed ways, from the next step on; for benches."""
        self._choice.use(ways)

    def abandon(self) -> None:
        for pending in list(self._inbox.open.values()):
            self._close(pending)
        self._lockstep.leave()

    def ready(self) -> bool:
        return self._targets.ready()

    def idle_wait(self, timeout: float) -> None:
        end = time.monotonic() + timeout
        self._probe()
        while (left := end - time.monotonic()) > 0:
            due = self._lockstep.serve()
            if not self._receive(min(left, due), busy=False):  # a ``wake`` looks like the end of the time
                return

    def wake(self) -> None:
        self._transport.wake()

    def stats(self) -> ExchangeStats:
        """A copy of the counters; may be called from any thread."""
        return self._stats.copy()

    def ways(self) -> Sequence[Row]:
        table = self._choice.ways.table()
        sizes = Counter((row.rows, row.members) for row in table)
        return [row for row in table if sizes[row.rows, row.members] > 1]

    def samples(self) -> Iterable[Sample]:
        yield from exchange_samples(self.stats())
        yield from way_samples(self.ways(), self._lockstep.formed, self._lockstep.broken)

    def close(self) -> None:
        self._transport.close()

    # ---- a step -----------------------------------------------------------------------------------------

    def begin(self, rows: int) -> bool:
        placement = self._targets.placement
        standing = Standing(placement.version if placement else 0, self._targets.live)
        group = self._lockstep.begin(rows, standing)
        self._choice.begin(group, rows)
        if self._tap:
            self._tap.begin(group.number if group else 0)
        self._repeats = self._stats.repeats.total()
        return group is not None

    def end(self) -> None:
        self._choice.end(undisturbed=self._repeats == self._stats.repeats.total())
        self._lockstep.end()

    # ---- one exchange -----------------------------------------------------------------------------------

    def dispatch(self, layer: int, rows: Tensor, trace: tuple[bytes, bytes] = NO_TRACE) -> Pending:
        if not self._targets.asked(layer):
            self._stats.unavailable += 1
            raise ExchangeUnavailable(layer, self._targets.absent(), "some experts have no home to ask")
        self._sequence += 1
        now = time.monotonic()
        pending = Pending(layer, self._sequence, rows, now, now + self._give_up, self._deadline, self._pause)
        pending.trace = trace
        self._inbox.open[pending.sequence] = pending
        self._join_rows(pending)
        if pending.leader:
            pending.missing = LEADER
            self._set_deadline(pending)
        else:
            self._aim(pending)
            self._sender.send(pending, pending.asked)
        return pending

    def _join_rows(self, pending: Pending) -> None:
        """Give our rows to the group's leader, or collect those of all members if that is us."""
        group, pending.way = self._lockstep.group, self._choice.way
        if group is None or pending.way == (Phase.ONE, Gate.ATTENTION):
            pending.way = pending.way.straight() if pending.way.phase is Phase.ONE else pending.way
            return
        pending.group = group
        if pending.way.phase is Phase.ONE:
            return
        if group.leader != self._incarnation:
            pending.leader = group.leader
            self._lockstep.send_rows(group, pending.sequence, pending.layer, pending.rows)
            return
        whole = self._scratch.rows("rows", group.total, self._hidden, self._dtype)
        if self._lockstep.collect(group, pending.layer, pending.rows, whole, pending.started + self._deadline):
            pending.mine, pending.rows = pending.rows, whole
        else:
            self._stats.repeats["group"] += 1
            self._part(pending)

    def combine(self, handle: Handle, x: Tensor) -> None:
        assert isinstance(handle, Pending)  # ours: dispatch made it
        start = time.monotonic()
        try:
            self._gather(handle, x)
            self._stats.exchanges += 1
            taken = time.monotonic() - handle.started
            self._stats.seconds.observe(taken)
            self._choice.exchanged(taken)
            if self._tap and handle.sums is None:  # else the group's leader knows
                self._tap.combined(handle.layer, self._sum.chosen)
        except ExchangeUnavailable:
            self._stats.unavailable += 1
            raise
        finally:
            self._close(handle)
            self._stats.waited += time.monotonic() - start

    def _gather(self, pending: Pending, x: Tensor) -> None:
        """Return when all replies are here, agree and are added to ``x``."""
        if pending.sequence not in self._inbox.open:
            raise ExchangeUnavailable(pending.layer, [], "the exchange was given up")
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
        total = self._scratch.rows("sums", len(pending.rows), self._hidden, torch.float32).zero_() if leads else x
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
        if placement and self._foreseen > placement.version:
            pending.problem = f"placement {self._foreseen} has taken its place"
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
        lost = self._targets.unreachable(pending.missing, self._members)
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

    # ---- frames -----------------------------------------------------------------------------------------

    def _probe(self) -> None:
        """Ask suspects for the parts of no rows: one that answers is trusted, even while NATS is away."""
        suspects, now = self._targets.suspects(), time.monotonic()
        if not suspects or now < self._probe_at:
            return
        self._probe_at = now + self._deadline
        self._sender.hello(self._targets.peers(suspects))
        layer, nothing = next(iter(self._targets.homes)), torch.empty(0, self._hidden)
        self._sender.send(Pending(layer, 0, nothing, now, now, 0.0, 0.0, self._targets.live), suspects)

    def _take_other(self, incoming: Incoming) -> str:
        if incoming.header.kind == FrameKind.PONG:
            return self._meter.take(incoming)
        return self._lockstep.take(incoming)

    def _receive(self, timeout: float, busy: bool = True, together: int = 1) -> bool:
        incoming = self._transport.receive(max(timeout, 0.0), busy, together)
        if incoming is None:
            return False
        self._inbox.take(incoming)
        return True

    def _close(self, pending: Pending) -> None:
        pending.forget_replies()
        self._inbox.open.pop(pending.sequence, None)
