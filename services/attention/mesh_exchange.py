"""The exchange over a transport: what an attention instance does with it between steps, and around each exchange.

Who is live is decided in targets.py, who runs a step together in lockstep.py, which way rows go in ways.py; one
exchange, with its deadlines and repeats, is attempts.py's, what is sent to experts sending.py's, which frame belongs to
which exchange pending.py's, what replies contain replies.py's.
"""

import time
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor

from services.attention.attempts import Attempts, Foreseen
from services.attention.exchange import Halt, Handle, Score, View
from services.attention.express import Express, Sent
from services.attention.links import LinkMeter, WayChoice
from services.attention.lockstep import Lockstep, Standing
from services.attention.pending import ExchangeStats, Inbox, Pending
from services.attention.replies import Sum
from services.attention.sending import Sender
from services.attention.stats import exchange_samples, way_samples
from services.attention.tap import RoutingTap
from services.attention.targets import Targets
from services.attention.ways import SOLO, Gate, Phase, Row, Ways
from shared.errors import ExchangeUnavailable
from shared.kernels.base import Kernels
from shared.metrics import Sample
from shared.models.moe import ExpertLayer
from shared.models.scratch import Scratch
from shared.telemetry import NO_TRACE
from shared.transport.base import FrameKind, Incoming, Transport

CPU = torch.device("cpu")
GIVEN_UP = "the exchange was given up"


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
        partial: experts answer with sums instead of parts, which take fewer bytes and are not exact to the bit.
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
        partial: bool = False,
    ) -> None:
        self._transport = transport
        self._hidden = hidden
        self._incarnation = incarnation
        self._deadline, self._pause = deadline, pause
        self._give_up = give_up or 3 * deadline
        self._targets = Targets(transport)
        self._stats = ExchangeStats()
        self._inbox = Inbox(self._targets, self._stats, mesh, hidden, self._take_other)
        self._sum = Sum(kernels, top_k)
        signed = {"mesh": mesh, "incarnation": incarnation}
        asks = {"dtype": dtype, "partial": partial, **signed}
        self._sender = Sender(transport, self._targets, gates or {}, self._stats, **asks)
        self._meter = LinkMeter(transport, hidden=hidden, max_rows=max_rows, pump=self._receive, **signed)
        self._choice = WayChoice(ways or Ways(Phase.DIRECT, Gate.EXPERTS), self._targets, self._meter, hidden, top_k)
        self._lockstep = Lockstep(
            transport, max_rows=max_rows, share=group_wait, pump=self._receive, choose=self._choice.choose,
            learn=self._choice.learn, **signed,
        )  # fmt: skip
        self._attempts = Attempts(
            self._targets, self._sender, self._lockstep, self._sum, self._stats, Scratch(device), self._receive,
            incarnation=incarnation, dtype=dtype, deadline=deadline, give_up=self._give_up,
        )  # fmt: skip
        here = {"hidden": hidden, "top_k": top_k, **signed}
        self._express = Express(transport.lane, self._targets, **here) if transport.lane and not partial else None
        self._repeats, self._prefill = 0, False
        self._tap = tap
        self._sequence = 0
        self._probe_at = 0.0

    @property
    def address(self) -> bytes:
        return self._transport.address

    def warm_up(self, layer: int, x: Tensor) -> None:
        self._sum.warm_up(x)
        self._sender.warm_up(layer, x)

    def foresee(self, view: View) -> None:
        members = frozenset(instance.incarnation for instance in view.instances.values())
        self._attempts.foreseen = Foreseen(members, view.placement.version if view.placement else 0)

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
        if self._express:
            self._express.open = None
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

    def begin(self, rows: int, prefill: bool = False) -> bool:
        self._prefill = prefill
        placement = self._targets.placement
        standing = Standing(placement.version if placement else 0, self._targets.live)
        group = self._lockstep.begin(rows, standing)
        self._choice.begin(group, rows)
        if self._express:
            self._express.begin(allowed=group is None and not prefill and self._choice.way == SOLO)
        if self._tap:
            self._tap.begin(group.number if group else 0)
        self._repeats = self._stats.repeats.total()
        return group is not None

    def end(self) -> None:
        self._lockstep.end(self._choice.end(undisturbed=self._repeats == self._stats.repeats.total()))

    # ---- one exchange -----------------------------------------------------------------------------------

    def dispatch(self, layer: int, rows: Tensor, trace: tuple[bytes, bytes] = NO_TRACE) -> Handle:
        if not self._targets.asked(layer):
            self._stats.unavailable += 1
            raise ExchangeUnavailable(layer, self._targets.absent(), "some experts have no home to ask")
        self._sequence += 1
        if self._express and trace == NO_TRACE and not self._inbox.open:
            sent = self._express.dispatch(layer, rows, self._sequence)
            if sent:
                self._stats.bytes_sent += self._express.sent_bytes(len(rows))
                return sent
        pending = self._pending(layer, self._sequence, rows, time.monotonic())
        pending.trace = trace
        self._attempts.begin(pending)
        return pending

    def _pending(self, layer: int, sequence: int, rows: Tensor, started: float) -> Pending:
        pending = Pending(layer, sequence, rows, started, started + self._give_up, self._deadline, self._pause)
        pending.way, pending.prefill = self._choice.way, self._prefill
        self._inbox.open[sequence] = pending
        return pending

    def combine(self, handle: Handle, x: Tensor) -> None:
        start, sent = time.monotonic(), isinstance(handle, Sent)
        if isinstance(handle, Sent):
            if self._collect(handle, x):
                self._stats.waited += time.monotonic() - start
                return
            handle = self._pending(handle.layer, handle.sequence, handle.rows, handle.started)
        assert isinstance(handle, Pending)  # ours: dispatch made it
        try:
            if handle.sequence not in self._inbox.open:
                raise ExchangeUnavailable(handle.layer, [], GIVEN_UP)
            if sent:
                self._attempts.resume(handle)
            self._attempts.finish(handle, x)
            self._took(time.monotonic() - handle.started)
            if self._tap and handle.sums is None:  # else the group's leader knows
                self._tap.combined(handle.layer, self._sum.chosen)
        except ExchangeUnavailable:
            self._stats.unavailable += 1
            raise
        finally:
            self._close(handle)
            self._stats.waited += time.monotonic() - start

    def _took(self, seconds: float) -> None:
        self._stats.exchanges += 1
        self._stats.seconds.observe(seconds)
        self._choice.exchanged(seconds)

    def _collect(self, sent: Sent, x: Tensor) -> bool:
        express = self._express
        if express is None or express.open is not sent:
            self._stats.unavailable += 1
            raise ExchangeUnavailable(sent.layer, [], GIVEN_UP)
        if not express.combine(sent, x):
            return False
        self._stats.express += 1
        self._took(time.monotonic() - sent.started)
        self._stats.bytes_received += express.received_bytes(len(sent.rows))
        if self._tap:
            self._tap.combined(sent.layer, express.chosen)
        return True

    def march(self, score: Score, first: int, rows: Tensor, x: Tensor) -> Halt | None:
        if self._express is None or self._inbox.open:
            return None
        express = self._express
        marched = express.march(score, first, rows, x, self._sequence + 1)
        if marched is None:
            return None
        halt, done = marched
        begun = len(done) + (halt.handle is not None)
        self._sequence += begun
        for number, seconds in done.items():
            self._took(seconds)
            if self._tap:
                self._tap.combined(score.layers[number], express.choices[number])
        self._stats.express += len(done)
        self._stats.waited += sum(done.values())
        self._stats.bytes_sent += begun * express.sent_bytes(len(rows))
        self._stats.bytes_received += len(done) * express.received_bytes(len(rows))
        return halt

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
