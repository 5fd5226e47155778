"""All open requests of one instance: accepting, output, every way to end, acknowledgement.

Belongs to the compute thread. Every path that ends a request frees its blocks and leaves its output in the outbox until
the gateway has it. When a step runs and what it computes is engine.py's.
"""

from collections import Counter, defaultdict

from services.attention.batching import Batcher
from services.attention.desk import Desk
from services.attention.outbox import Outbox
from services.attention.phases import Phases
from services.attention.sampler import Choice
from services.attention.sequence import Sequence, Trace
from shared.request_messages import Ack, Decision, FinishReason, RefusalCode, Submit, TokenDelta

NOT_A_NUMBER = "the model computed a value that is not a number"


class Requests:
    """Sequences by request id, and what is to be sent about them."""

    def __init__(self, batcher: Batcher, desk: Desk, phases: Phases) -> None:
        self._batcher = batcher
        self._desk = desk
        self._phases = phases
        self._outbox = Outbox()
        self._deltas: defaultdict[str, list[TokenDelta]] = defaultdict(list)
        self.active: dict[str, Sequence] = {}
        self.finished: Counter[str] = Counter()
        """By finish reason; errors by their code."""
        self.generated = 0
        """Tokens since the start."""

    @property
    def unacknowledged(self) -> int:
        return len(self._outbox)

    def take_deltas(self) -> dict[str, list[TokenDelta]]:
        """What was said since the last call, by gateway."""
        deltas, self._deltas = self._deltas, defaultdict(list)
        return deltas

    # ---- commands ---------------------------------------------------------------------------------------

    def accept(self, request: Submit, admitted: float, now: float, trace: Trace) -> None:
        """Queue a request that was admitted before ``now``."""
        sequence = Sequence.from_submit(request, self._batcher.pool, admitted, trace)
        self._phases.enter(sequence, "queue", now - admitted)
        self.active[request.request_id] = sequence
        self._outbox.open(request.request_id, request.gateway, sequence.generated, sequence.deadline)
        ended = self._ended(sequence) if sequence.resumed else None
        if ended:
            self._finish(sequence, ended)
        else:
            self._batcher.add(sequence)

    def cancel(self, request_id: str) -> None:
        """Forget it completely; unknown ids are fine."""
        if (sequence := self.active.get(request_id)) is not None:
            self._finish(sequence, "cancelled")
        self._outbox.drop(request_id)
        self._desk.forget([request_id])

    def resend(self, request_id: str, position: int) -> None:
        entry = self._outbox.get(request_id)
        delta = self._outbox.since(request_id, position)
        if entry is not None and delta is not None:
            self._deltas[entry.gateway].append(delta)

    def acknowledge(self, ack: Ack) -> None:
        self._desk.forget(self._outbox.acknowledge(ack))

    def drop_gateway(self, gateway: str) -> None:
        """Forget everything of a gateway that is gone."""
        for sequence in [s for s in self.active.values() if s.gateway == gateway]:
            self._finish(sequence, "cancelled")
        self._desk.forget(self._outbox.drop_gateway(gateway))

    # ---- results ----------------------------------------------------------------------------------------

    def advance(self, sequence: Sequence, choice: Choice) -> None:
        """Append the chosen token, or end the request."""
        if choice.token is None:
            self.fail_broken(sequence)
        elif sequence.sampling.max_tokens == 0:
            self._finish(sequence, "length")
        else:
            sequence.append(choice.token)
            self._phases.enter(sequence, "decode")
            self.generated += 1
            ended = self._ended(sequence)
            if ended:
                self._finish(sequence, ended, choice)
            else:
                self._say(sequence, choice)

    def fail(self, sequence: Sequence, code: RefusalCode, message: str) -> None:
        """End one request with an error that reaches the client."""
        self._finish(sequence, "error", error=Decision(ok=False, code=code, message=message))

    def fail_broken(self, sequence: Sequence) -> None:
        """End a request whose numbers are none; nobody may begin with what it leaves in the cache."""
        self._batcher.pool.forget(sequence.table.ids)
        self.fail(sequence, "internal", NOT_A_NUMBER)

    def expire(self, now: float) -> None:
        """End what is past its deadline; forget finished output that nobody fetched."""
        for sequence in [s for s in self.active.values() if now >= s.deadline]:
            self.fail(sequence, "deadline", f"not finished within {sequence.deadline - sequence.arrived:g} s")
        self._desk.forget(self._outbox.expire(now))

    def _ended(self, sequence: Sequence) -> FinishReason | None:
        return sequence.ended(self._batcher.limits.max_model_len)

    def _finish(
        self, sequence: Sequence, reason: FinishReason, choice: Choice | None = None, error: Decision | None = None
    ) -> None:
        self._batcher.remove(sequence)
        self._phases.end(sequence)
        del self.active[sequence.request_id]
        self.finished[(error and error.code) or reason] += 1
        self._say(sequence, choice, reason, error)

    def _say(
        self,
        sequence: Sequence,
        choice: Choice | None = None,
        finish: FinishReason | None = None,
        error: Decision | None = None,
    ) -> None:
        entry = self._outbox.get(sequence.request_id)
        assert entry is not None  # an active request always has one
        position = entry.end
        if position == 0:
            entry.prompt_logprobs = tuple(sequence.prompt_logprobs)
        if choice is not None and choice.token is not None:
            entry.tokens.append(choice.token)
            entry.logprobs.extend([choice.logprobs] if choice.logprobs else [])
            entry.stop_token = choice.token if finish == "stop" else None
        entry.finish, entry.error = finish, error
        self._deltas[sequence.gateway].append(entry.since(position))
