"""The exchange over a transport: send, wait with deadlines, repeat, verify, sum.

One-phase: all rows go to every live expert instance. Who is live is decided in targets.py, which frame belongs to
which exchange in pending.py, what replies must contain in replies.py.
"""

import math
import time
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from services.attention.exchange import Handle, View
from services.attention.pending import ExchangeStats, Inbox, Pending
from services.attention.replies import Sum
from services.attention.stats import exchange_samples
from services.attention.tap import RoutingTap
from services.attention.targets import Targets
from shared.errors import ExchangeUnavailable
from shared.kernels.base import Kernels
from shared.metrics import Sample
from shared.telemetry import NO_TRACE
from shared.transport.base import DTYPES, FrameKind, Header, Peer, Transport

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
        tap: RoutingTap | None = None,
    ) -> None:
        self._transport = transport
        self._kernels = kernels
        self._hidden, self._dtype = hidden, dtype
        self._mesh, self._incarnation = mesh, incarnation
        self._deadline, self._pause = deadline, pause
        self._give_up = give_up or 3 * deadline
        self._targets = Targets(transport)
        self._stats = ExchangeStats()
        self._inbox = Inbox(self._targets, self._stats, mesh, hidden)
        self._top_k = top_k
        self._sum = Sum(kernels, top_k)
        self._tap = tap
        self._sequence = 0
        self._probe_at = 0.0
        self._members: frozenset[int] | None = None

    def warm_up(self, layer: int, x: Tensor) -> None:
        self._sum.warm_up(x)

    def foresee(self, view: View) -> None:
        self._members = frozenset(instance.incarnation for instance in view.instances.values())

    # ---- between steps ----------------------------------------------------------------------------------

    def update(self, view: View) -> None:
        self.abandon()
        newcomers = self._targets.update(view)
        if newcomers:
            self._hello(newcomers)

    def abandon(self) -> None:
        for pending in list(self._inbox.open.values()):
            self._close(pending)

    def ready(self) -> bool:
        return self._targets.ready()

    def idle_wait(self, timeout: float) -> None:
        end = time.monotonic() + timeout
        self._probe()
        while (left := end - time.monotonic()) > 0 and self._receive(left, busy=False):
            pass

    def wake(self) -> None:
        self._transport.wake()

    def stats(self) -> ExchangeStats:
        """A copy of the counters; may be called from any thread."""
        return self._stats.copy()

    def samples(self) -> Iterable[Sample]:
        return exchange_samples(self.stats())

    def close(self) -> None:
        self._transport.close()

    # ---- one exchange -----------------------------------------------------------------------------------

    def dispatch(self, layer: int, rows: Tensor, trace: tuple[bytes, bytes] = NO_TRACE) -> Pending:
        if not self._targets.asked(layer):
            self._stats.unavailable += 1
            raise ExchangeUnavailable(layer, self._targets.absent(), "some experts have no home to ask")
        if self._tap:
            self._tap.dispatched(layer, alone=not self._inbox.open)
        self._sequence += 1
        now = time.monotonic()
        pending = Pending(layer, self._sequence, rows, now, now + self._give_up, self._deadline, self._pause)
        pending.trace = trace
        self._inbox.open[pending.sequence] = pending
        self._aim(pending)
        self._send(pending, pending.asked)
        return pending

    def combine(self, handle: Handle, x: Tensor) -> None:
        assert isinstance(handle, Pending)  # ours: dispatch made it
        start = time.monotonic()
        try:
            self._gather(handle, x)
            self._stats.exchanges += 1
            self._stats.seconds.observe(time.monotonic() - handle.started)
            if self._tap:
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
        received = self._receive(min(due - time.monotonic(), SLICE_S), together=pending.missing.bit_count())
        now = time.monotonic()
        if now >= pending.deadline:
            self._catch_up()
        if pending.fatal:
            raise self._unavailable(pending, pending.refused)
        if not pending.missing:
            return
        if now >= pending.deadline:
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
        replies = pending.replies
        if len({reply.header.digest for reply in replies.values()}) > 1:
            pending.problem = "replicas were chosen differently"
            return "digest"
        sources = [(bit.bit_length() - 1, reply) for bit, reply in replies.items()]
        problem = self._sum.add(sources, self._targets.homes[pending.layer], x)
        pending.problem = problem or pending.problem
        return "parts" if problem else ""

    # ---- trouble ----------------------------------------------------------------------------------------

    def _overdue(self, pending: Pending, now: float) -> None:
        self._suspect(pending.missing)
        if now >= pending.give_up:
            pending.problem = pending.problem or f"no answer within {self._give_up:g} s"
            raise self._unavailable(pending, pending.missing)
        pending.patience = min(2 * pending.patience, LONGEST_PATIENCE * self._deadline)
        self._again(pending, pending.missing, "deadline")

    def _retry_refused(self, pending: Pending) -> None:
        refused, pending.refused, pending.retry_at = pending.refused, 0, math.inf
        if refused & pending.refused_before:
            self._suspect(refused)
        pending.refused_before |= refused
        self._again(pending, refused, "refusal")

    def _look_for_dead(self, pending: Pending) -> None:
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
        if self._targets.live != pending.live:
            pending.patience = self._deadline
            afresh = True
        if afresh:
            self._aim(pending)
            mask = pending.asked
        elif reason == "deadline":
            self._set_deadline(pending)
        self._hello(self._targets.peers(mask))
        self._send(pending, mask)

    def _aim(self, pending: Pending) -> None:
        """Point the exchange at the instances that are live now; nobody has answered yet."""
        pending.forget_replies()
        pending.live = self._targets.live
        pending.asked = pending.missing = self._targets.asked(pending.layer)
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

    def _send(self, pending: Pending, mask: int) -> None:
        placement = self._targets.placement
        assert placement is not None  # nobody is asked without one
        frame = self._transport.outgoing(0, len(pending.rows), self._hidden, self._dtype)
        frame.rows.copy_(pending.rows)
        header = Header(
            FrameKind.DISPATCH, self._mesh, self._incarnation, pending.sequence, pending.attempt,
            placement.epoch, self._incarnation, placement.version, pending.live, pending.layer,
            trace_id=pending.trace[0], span_id=pending.trace[1],
        )  # fmt: skip
        peers = self._targets.peers(mask)
        self._stats.bytes_sent += len(peers) * frame.rows.nbytes
        self._transport.send(peers, header, frame)

    def _hello(self, peers: Sequence[Peer]) -> None:
        """Tell experts where to reply: they may be new, have restarted, or have lost the first one."""
        address = self._transport.address
        frame = self._transport.outgoing(len(address), 0, 0, DTYPES[0])
        frame.meta[:] = memoryview(address)
        self._transport.send(peers, Header(FrameKind.HELLO, self._mesh, self._incarnation, 0), frame)

    def _probe(self) -> None:
        """Ask suspects for the parts of no rows: one that answers is trusted, even while NATS is away."""
        suspects, now = self._targets.suspects(), time.monotonic()
        if not suspects or now < self._probe_at:
            return
        self._probe_at = now + self._deadline
        self._hello(self._targets.peers(suspects))
        layer, nothing = next(iter(self._targets.homes)), torch.empty(0, self._hidden)
        self._send(Pending(layer, 0, nothing, now, now, 0.0, 0.0, self._targets.live), suspects)

    def _receive(self, timeout: float, busy: bool = True, together: int = 1) -> bool:
        incoming = self._transport.receive(max(timeout, 0.0), busy, together)
        if incoming is None:
            return False
        self._inbox.take(incoming)
        return True

    def _close(self, pending: Pending) -> None:
        pending.forget_replies()
        self._inbox.open.pop(pending.sequence, None)
