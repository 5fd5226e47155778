"""The compute thread: takes commands, batches, runs the model, samples, emits.

One turn of the loop is ``turn``. What runs next is batching.py's, what a request says and how it ends requests.py's,
tensors are step.py's, NATS is server.py's.
"""

import logging
import queue
import time
from collections.abc import Callable
from functools import partial

import torch

from services.attention.batching import Batcher, Chunk
from services.attention.desk import ACCEPTED, Desk
from services.attention.exchange import Exchange, View
from services.attention.phases import Phases, Record, ignore
from services.attention.prompt_logprobs import collect
from services.attention.requests import Requests
from services.attention.sampler import choose
from services.attention.sequence import Trace
from services.attention.stats import EngineStats
from services.attention.step import ModelRunner
from shared.errors import ExchangeUnavailable
from shared.keep_awake import KeepAwake, LetHalt
from shared.metrics import Buckets
from shared.request_messages import Ack, Decision, RefusalCode, Submit, TokenDelta
from shared.telemetry import NO_TRACE

IDLE_WAIT_S = 1.0
STALLED_WAIT_S = 0.05
RETRY_S = 1.0
"""Pause before a step is tried again while some expert has no home that answers."""
HOUSEKEEPING_S = 0.05
"""How often deadlines are looked at."""

Emit = Callable[[str, list[TokenDelta]], None]
log = logging.getLogger(__name__)


class Engine:
    """All requests of one attention instance. ``run`` and ``turn`` belong to the compute thread.

    Args:
        emit: gets a gateway's id and the deltas of one turn, in the compute thread.
        no_home_deadline: seconds that requests wait while experts do not answer.
        clock: monotonic seconds.
        record: gets the spans of traced requests, in the compute thread.
        awake: held while there are steps to compute.
    """

    def __init__(
        self,
        runner: ModelRunner,
        exchange: Exchange,
        batcher: Batcher,
        emit: Emit,
        no_home_deadline: float,
        clock: Callable[[], float] = time.monotonic,
        record: Record = ignore,
        awake: KeepAwake | None = None,
    ) -> None:
        self._runner = runner
        self._exchange = exchange
        self._batcher = batcher
        self._emit = emit
        self._no_home_deadline = no_home_deadline
        self._clock = clock
        self._awake = awake or LetHalt()
        self.desk = Desk(batcher.limits)
        self._phases = Phases(record)
        self._requests = Requests(batcher, self.desk, self._phases)
        self._commands: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self.stats = EngineStats()
        """As of the last turn; immutable, for any thread."""
        self.step_seconds = Buckets()
        self._stopping = False
        self._stalled_since: float | None = None
        self._retry_at = self._housekeeping_at = 0.0
        self._placement = self._steps = self._prompt_tokens = self._accepted = 0

    @property
    def open(self) -> int:
        """Requests that are admitted and not finished."""
        return self.desk.on_the_way + self.stats.waiting + self.stats.running

    # ---- any thread: put a command on the queue and wake the loop ---------------------------------------

    def submit(self, request: Submit, trace: Trace = NO_TRACE) -> Decision:
        """Admit or refuse at once. Idempotent by request id. ``trace`` marks the request's first exchange."""
        now = self._clock()
        decision, new = self.desk.admit(request, self.stats, now)
        if new:
            self._put(partial(self._accept, request, now, trace))
        return decision

    def cancel(self, request_id: str) -> None:
        """Blocks are free before the next step; unknown ids are fine."""
        self._put(partial(self._requests.cancel, request_id))

    def resend(self, request_id: str, position: int) -> Decision:
        """Everything from ``position`` on goes out again, as far as it is not acknowledged."""
        if not self.desk.knows(request_id):
            return Decision(ok=False, code="unknown", message=f"no request {request_id} here")
        self._put(partial(self._requests.resend, request_id, position))
        return ACCEPTED

    def acknowledge(self, ack: Ack) -> None:
        self._put(partial(self._requests.acknowledge, ack))

    def drop_gateway(self, gateway: str) -> None:
        """A gateway is gone, and so is everybody who would read its requests' output."""
        self._put(partial(self._requests.drop_gateway, gateway))

    def update(self, view: View) -> None:
        """Use another placement or other expert instances from the next step on."""
        self._put(partial(self._update, view))

    def fail_all(self, code: RefusalCode, message: str) -> None:
        """End every open request with an error."""
        self._put(partial(self._fail_all, code, message))

    def stop(self) -> None:
        """End ``run`` before its next step."""
        self._put(self._stop)

    def _put(self, command: Callable[[], None]) -> None:
        self._commands.put(command)
        self._exchange.wake()

    # ---- the loop ---------------------------------------------------------------------------------------

    def run(self) -> None:
        """Until ``stop``. What it raises is a defect and ends the process."""
        with torch.inference_mode():
            while not self._stopping:
                if not self.turn() and self._commands.empty():
                    self._awake.release()
                    self._exchange.idle_wait(STALLED_WAIT_S if self._requests.active else IDLE_WAIT_S)

    def turn(self) -> bool:
        """Commands, deadlines, at most one step; what came of it goes out. False: nothing was computed."""
        while not self._commands.empty():
            self._commands.get()()
        now = self._clock()
        if now >= self._housekeeping_at:
            self._housekeeping_at = now + HOUSEKEEPING_S
            self._requests.expire(now)
            self._give_up(now)
        worked = not self._stopping and self._try_step(now)
        self._publish()
        for gateway, deltas in self._requests.take_deltas().items():
            self._emit(gateway, deltas)
        return worked

    def _accept(self, request: Submit, now: float, trace: Trace) -> None:
        self._accepted += 1
        self._requests.accept(request, now, self._clock(), trace)

    def _update(self, view: View) -> None:
        self._exchange.update(view)
        self._placement = view.placement.version if view.placement else 0

    def _fail_all(self, code: RefusalCode, message: str) -> None:
        for sequence in list(self._requests.active.values()):
            self._requests.fail(sequence, code, message)

    def _stop(self) -> None:
        self._stopping = True

    def _publish(self) -> None:
        """A new snapshot, and the desk's word that the admitted requests are in it."""
        self.stats = EngineStats(
            waiting=len(self._batcher.waiting),
            running=len(self._batcher.running),
            outstanding_tokens=sum(s.outstanding for s in self._requests.active.values()),
            kv_blocks_used=self._batcher.pool.used,
            placement=self._placement,
            unready_since=self._unready_since(),
            stalled=self._stalled_since is not None and bool(self._requests.active),
            unacknowledged=self._requests.unacknowledged,
            steps=self._steps,
            split_steps=self._runner.split_steps,
            prompt_tokens=self._prompt_tokens,
            generated_tokens=self._requests.generated,
            preemptions=self._batcher.preemptions,
            reused_tokens=self._batcher.reused,
            finished=self._requests.finished.copy(),
        )
        if self._accepted:
            self.desk.taken(self._accepted)
            self._accepted = 0

    def _unready_since(self) -> float | None:
        if self._exchange.ready():
            return None
        before = self.stats.unready_since
        return self._clock() if before is None else before

    # ---- a step -----------------------------------------------------------------------------------------

    def _try_step(self, now: float) -> bool:
        """False when there is nothing to compute, or experts do not answer yet."""
        if self._stalled_since is not None and now < self._retry_at and not self._exchange.ready():
            return False
        chunks = self._batcher.next_step()
        if not chunks:
            return False
        self._awake.hold()
        try:
            self._step(chunks)
        except ExchangeUnavailable as error:
            self._stall(error)
            return False
        self._stalled_since = None
        return True

    def _step(self, chunks: list[Chunk]) -> None:
        """No sequence advances unless the whole forward pass succeeds."""
        start = self._clock()
        for chunk in chunks:
            if chunk.sequence.pending > 1 or chunk.first:
                self._phases.enter(chunk.sequence, "prefill")
        done = self._runner.forward(chunks)
        broken = collect(chunks, partial(self._runner.logits_of, done))
        complete = [chunk.sequence for chunk in chunks if chunk.complete]
        choices = choose(self._runner.logits(done), complete) if complete else []
        self.step_seconds.observe(self._clock() - start)
        self._steps += 1
        for chunk in chunks:
            self._prompt_tokens += min(chunk.count, max(chunk.sequence.prompt - chunk.start, 0))
            chunk.sequence.advance(chunk.count, self._batcher.pool)
        for sequence in broken:
            self._requests.fail_broken(sequence)
        for sequence, choice in zip(complete, choices, strict=True):
            if sequence.request_id in self._requests.active:
                self._requests.advance(sequence, choice)

    def _stall(self, error: ExchangeUnavailable) -> None:
        """Keep everything as it is; the same rows are computed again as soon as experts answer."""
        now = self._clock()
        if self._stalled_since is None:
            self._stalled_since = now
            log.warning("step put off: %s", error)
        self._retry_at = now + RETRY_S

    def _give_up(self, now: float) -> None:
        """Fail the requests that have waited for experts for too long."""
        if self._stalled_since is None:
            return
        for sequence in list(self._requests.active.values()):
            if now - max(self._stalled_since, sequence.arrived) >= self._no_home_deadline:
                self._requests.fail(sequence, "no_experts", f"no answer from experts in {self._no_home_deadline:g} s")
