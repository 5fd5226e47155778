"""An attention instance that computes nothing: the real NATS protocol, pseudo-random tokens, faults on demand.

A token depends only on (prompt, seed, position), as in the real service, so that a resumed request goes on exactly.
"""

import asyncio
import hashlib
import secrets
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

import numpy as np

from shared.bus import Bus
from shared.messages import AttentionFacts, Heartbeat, Hello, Kind, ModelFacts, State, Subjects
from shared.request_messages import Ack, Cancel, Decision, Resend, Submit, TokenDelta, TokenLogprobs, Tokens

Script = Callable[[list[int], int], Sequence[int]]
"""(prompt, seed) -> output tokens; the output ends as if by length after the last one."""


def pseudo_token(prompt: Sequence[int], seed: int, position: int, vocab: int) -> int:
    """Never 0, the end-of-sequence token of the demo model."""
    data = repr((list(prompt), seed, position)).encode()
    return int.from_bytes(hashlib.blake2b(data, digest_size=6).digest(), "big") % (vocab - 1) + 1


@dataclass
class Faults:
    """What happens to the messages with tokens. A message is one in the order of sending."""

    drop: Callable[[int], bool] = lambda _: False
    repeat: Callable[[int], bool] = lambda _: False
    delay: Callable[[int], float] = lambda _: 0.0
    """Seconds; delayed messages are overtaken."""
    refuse: Decision | None = None
    """Answer to every Submit."""
    die_at: int | None = None
    """Position at which the instance vanishes without a word."""
    fail_at: int | None = None
    """Position at which a request ends with the error below."""
    failures: int = 1000
    """How many requests do so."""
    error: Decision = field(default_factory=lambda: Decision(ok=False, code="internal", message="secret detail"))
    silent_at: int | None = None
    """Position after which nothing is sent any more."""


@dataclass
class Work:
    """One accepted request."""

    submit: Submit
    prompt: list[int]
    output: list[int]
    task: asyncio.Task[None] | None = None
    deltas: list[TokenDelta] = field(default_factory=list)


class FakeAttention:
    def __init__(self, bus: Bus, mesh: str, model: ModelFacts, vocab: int, id: str = "", **facts: int) -> None:
        self.bus = bus
        self.id = id or f"attention-{secrets.token_hex(3)}"
        self.subjects = Subjects(mesh)
        self.model = model
        self.vocab = vocab
        self.facts = {
            "max_model_len": 256, "kv_blocks": 64, "block_size": 16, "max_num_seqs": 64, "placement": 1,
        } | facts  # fmt: skip
        self.incarnation = secrets.randbits(64)
        self.state = State.READY
        self.faults = Faults()
        self.step_s = 0.0
        self.chunk = 1
        """Tokens per message."""
        self.script: Script | None = None
        self.work: dict[str, Work] = {}
        self.submits: list[Submit] = []
        self.cancelled: list[str] = []
        self.done: set[str] = set()
        self.resends: list[Resend] = []
        self.acked: dict[str, int] = {}
        self._sent = 0
        self._parts: dict[str, list[int]] = {}
        self._unsubscribe: list[Callable] = []
        self._beating: asyncio.Task[None] | None = None
        self._late: set[asyncio.Task[None]] = set()

    async def start(self) -> None:
        handlers = {
            "submit": (Submit, self._on_submit),
            "cancel": (Cancel, self._on_cancel),
            "resend": (Resend, self._on_resend),
            "ack": (Ack, self._on_ack),
        }
        for verb, (kind, handler) in handlers.items():
            end = await self.bus.subscribe(self.subjects.attention(self.id, verb), kind, handler)  # type: ignore[arg-type]
            self._unsubscribe.append(end)
        self._unsubscribe.append(await self.bus.subscribe(self.subjects.hello, Hello, lambda _: self.beat()))
        self._beating = asyncio.create_task(self._beat_for_ever())

    async def beat(self) -> None:
        facts = AttentionFacts(**self.facts)  # type: ignore[arg-type]
        message = Heartbeat(
            kind=Kind.ATTENTION, id=self.id, incarnation=self.incarnation, state=self.state, node="test",
            model=self.model, attention=facts,
        )  # fmt: skip
        await self.bus.publish(self.subjects.heartbeat(Kind.ATTENTION, self.id), message)

    async def say(self, **facts: int | bool) -> None:
        """Change what the heartbeats say, at once."""
        self.facts |= facts  # type: ignore[arg-type]
        await self.beat()

    async def die(self) -> None:
        """Vanish without a word, as after kill -9."""
        if self._beating:
            self._beating.cancel()
        for end in self._unsubscribe:
            await end()
        self._unsubscribe = []
        for work in self.work.values():
            if work.task and work.task is not asyncio.current_task():
                work.task.cancel()

    async def stop(self) -> None:
        """Leave properly."""
        await self.die()
        self.state = State.GONE
        await self.beat()

    async def _beat_for_ever(self) -> None:
        while True:
            await self.beat()
            await asyncio.sleep(0.5)

    # ---- the protocol -------------------------------------------------------------------------------------

    def _on_submit(self, submit: Submit) -> Decision:
        self.submits.append(submit)
        if self.faults.refuse:
            return self.faults.refuse
        self._parts.setdefault(submit.request_id, []).extend(_ids(submit.prompt))
        if submit.part < submit.parts - 1:
            return Decision(ok=True)
        work = Work(submit, self._parts.pop(submit.request_id), _ids(submit.output))
        self.work[submit.request_id] = work
        work.task = asyncio.create_task(self._compute(work))
        return Decision(ok=True)

    def _on_cancel(self, cancel: Cancel) -> Decision:
        self.cancelled.append(cancel.request_id)
        work = self.work.pop(cancel.request_id, None)
        if work and work.task:
            work.task.cancel()
        return Decision(ok=True)

    async def _on_resend(self, resend: Resend) -> Decision:
        self.resends.append(resend)
        work = self.work.get(resend.request_id)
        if work is None:
            return Decision(ok=False, code="unknown")
        late = [d for d in work.deltas if d.position + len(d.tokens) > resend.position or d.finish]
        if late and self.faults.silent_at is None:
            await self._publish(work.submit.gateway, *late)
        return Decision(ok=True)

    def _on_ack(self, ack: Ack) -> None:
        self.acked |= ack.received
        for request in ack.done:
            self.done.add(request)
            self.work.pop(request, None)

    # ---- tokens -------------------------------------------------------------------------------------------

    async def _compute(self, work: Work) -> None:
        sampling, tokens = work.submit.sampling, self._all_tokens(work)
        start = len(work.output)
        edges = [*range(start, len(tokens), self.chunk), len(tokens)]
        if len(edges) < 2:
            edges = [start, start]
        for first, end in pairwise(edges):
            if self.faults.die_at is not None and first >= self.faults.die_at:
                await self.die()
                return
            stop = tokens[end - 1] in sampling.stop_token_ids if end > first else False
            last = end == len(tokens)
            delta = TokenDelta(
                request_id=work.submit.request_id,
                position=first,
                tokens=tuple(tokens[first:end]),
                logprobs=self._logprobs(tokens[first:end], sampling.logprobs),
                finish=("stop" if stop else "length") if last else None,
                stop_token=tokens[end - 1] if stop else None,
                prompt_logprobs=self._prompt_logprobs(work) if first == 0 else (),
            )
            if self.faults.fail_at is not None and first >= self.faults.fail_at and self.faults.failures:
                self.faults.failures -= 1
                delta = delta.model_copy(update={"tokens": (), "finish": "error", "error": self.faults.error})
            work.deltas.append(delta)
            if self.faults.silent_at is None or first < self.faults.silent_at:
                await self._send(work.submit.gateway, delta)
            if delta.finish == "error":
                return
            await asyncio.sleep(self.step_s)

    def _all_tokens(self, work: Work) -> list[int]:
        """The whole output, resumed part included."""
        sampling = work.submit.sampling
        if self.script:
            tokens = list(self.script(work.prompt, sampling.seed))[: sampling.max_tokens]
        else:
            tokens = [pseudo_token(work.prompt, sampling.seed, p, self.vocab) for p in range(sampling.max_tokens)]
        for i, token in enumerate(tokens):
            if token in sampling.stop_token_ids and i >= sampling.min_tokens:
                return tokens[: i + 1]
        return tokens

    def _logprobs(self, tokens: Sequence[int], count: int) -> tuple[TokenLogprobs, ...]:
        if count < 0:
            return ()
        return tuple(
            TokenLogprobs(
                logprob=-1.5,
                rank=2,
                top=tuple((t % self.vocab, -0.5 - i) for i, t in enumerate(range(tok, tok + count))),
            )
            for tok in tokens
        )

    def _prompt_logprobs(self, work: Work) -> tuple[TokenLogprobs, ...]:
        count = work.submit.sampling.prompt_logprobs
        if count < 0:
            return ()
        return (TokenLogprobs(logprob=None), *self._logprobs(work.prompt[1:], count))

    async def _send(self, gateway: str, delta: TokenDelta) -> None:
        number, self._sent = self._sent, self._sent + 1
        if self.faults.drop(number):
            return
        if delay := self.faults.delay(number):
            task = asyncio.create_task(self._send_late(gateway, delta, delay))
            self._late.add(task)
            task.add_done_callback(self._late.discard)
            return
        for _ in range(2 if self.faults.repeat(number) else 1):
            await self._publish(gateway, delta)

    async def _send_late(self, gateway: str, delta: TokenDelta, delay: float) -> None:
        await asyncio.sleep(delay)
        await self._publish(gateway, delta)

    async def _publish(self, gateway: str, *deltas: TokenDelta) -> None:
        await self.bus.publish(self.subjects.tokens(gateway), Tokens(attention=self.id, deltas=deltas))


def _ids(data: bytes) -> list[int]:
    return np.frombuffer(data, dtype="<i4").tolist()
