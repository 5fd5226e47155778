"""What was generated and not yet acknowledged, so that it can be sent again; and packing deltas into messages.

NATS delivers at most once: positions make repeats harmless, acknowledgements let go. No I/O and no clock of its own.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field

from shared.request_messages import Ack, Decision, FinishReason, TokenDelta, TokenLogprobs

LINGER_S = 30.0
"""How long a finished request outlives its deadline, so that the gateway can still fetch the end."""
MESSAGE_BYTES = 400_000
"""Most bytes of deltas in one message, by estimate: well under the 512 KiB that a message may have."""


@dataclass(slots=True)
class Entry:
    """Output of one request from ``base`` on."""

    request_id: str
    gateway: str
    base: int
    expires: float
    """Monotonic seconds; only finished requests expire."""
    tokens: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    prompt_logprobs: tuple[TokenLogprobs, ...] = ()
    finish: FinishReason | None = None
    stop_token: int | None = None
    error: Decision | None = None

    @property
    def end(self) -> int:
        """Position of the next token."""
        return self.base + len(self.tokens)

    def since(self, position: int) -> TokenDelta:
        """Everything from ``position`` (not below ``base``) on, as one delta."""
        skip = position - self.base
        return TokenDelta(
            request_id=self.request_id,
            position=position,
            tokens=tuple(self.tokens[skip:]),
            logprobs=tuple(self.logprobs[skip:]),
            finish=self.finish,
            stop_token=self.stop_token,
            error=self.error,
            prompt_logprobs=self.prompt_logprobs if position == 0 else (),
        )

    def forget_below(self, position: int) -> None:
        done = min(position - self.base, len(self.tokens))
        if done > 0:
            del self.tokens[:done]
            del self.logprobs[:done]
            self.base += done
            self.prompt_logprobs = ()


class Outbox:
    """Entries by request id. Memory is bounded: running requests are, and finished ones expire."""

    def __init__(self) -> None:
        self._entries: dict[str, Entry] = {}

    def __len__(self) -> int:
        return len(self._entries)

    def __contains__(self, request_id: str) -> bool:
        return request_id in self._entries

    def open(self, request_id: str, gateway: str, position: int, deadline: float) -> Entry:
        """Start keeping the output of a request whose next token has ``position``."""
        entry = Entry(request_id, gateway, position, deadline + LINGER_S)
        self._entries[request_id] = entry
        return entry

    def get(self, request_id: str) -> Entry | None:
        return self._entries.get(request_id)

    def since(self, request_id: str, position: int) -> TokenDelta | None:
        """What to send again; None when the request is unknown or there is nothing new to say."""
        entry = self._entries.get(request_id)
        if entry is None:
            return None
        delta = entry.since(min(max(position, entry.base), entry.end))
        return delta if delta.tokens or delta.finish or delta.prompt_logprobs else None

    def acknowledge(self, ack: Ack) -> list[str]:
        """Forget what has arrived; returns the ids that are forgotten completely."""
        for request_id, position in ack.received.items():
            if (entry := self._owned(request_id, ack.gateway)) is not None:
                entry.forget_below(position)
        finished = [r for r in ack.done if (e := self._owned(r, ack.gateway)) is not None and e.finish]
        return self._forget(finished)

    def expire(self, now: float) -> list[str]:
        """Forget finished requests that nobody has acknowledged in time; returns their ids."""
        return self._forget([e.request_id for e in self._entries.values() if e.finish and now >= e.expires])

    def drop(self, request_id: str) -> None:
        self._entries.pop(request_id, None)

    def drop_gateway(self, gateway: str) -> list[str]:
        """Forget everything for a gateway that is gone; returns the ids."""
        return self._forget([e.request_id for e in self._entries.values() if e.gateway == gateway])

    def _owned(self, request_id: str, gateway: str) -> Entry | None:
        entry = self._entries.get(request_id)
        return entry if entry is not None and entry.gateway == gateway else None

    def _forget(self, request_ids: list[str]) -> list[str]:
        for request_id in request_ids:
            del self._entries[request_id]
        return request_ids


def pack(deltas: list[TokenDelta], limit: int = MESSAGE_BYTES) -> Iterator[tuple[TokenDelta, ...]]:
    """Deltas in order, in groups whose encoded size stays below about ``limit`` bytes; long deltas are cut."""
    group: list[TokenDelta] = []
    size = 0
    for delta in (piece for whole in deltas for piece in _cut(whole, limit)):
        more = _bytes(delta)
        if group and size + more > limit:
            yield tuple(group)
            group, size = [], 0
        group.append(delta)
        size += more
    if group:
        yield tuple(group)


def _bytes(delta: TokenDelta) -> int:
    """Upper estimate of the encoded size."""
    return 300 + 5 * len(delta.tokens) + _logprob_bytes(delta.logprobs) + _logprob_bytes(delta.prompt_logprobs)


def _logprob_bytes(many: tuple[TokenLogprobs, ...]) -> int:
    return sum(40 + 15 * len(one.top) for one in many)


def _cut(delta: TokenDelta, limit: int) -> Iterator[TokenDelta]:
    """Pieces of one delta, halved until they fit: prompt log-probabilities first, the finish with the last tokens."""
    if _bytes(delta) <= limit:
        yield delta
        return
    quiet = {"finish": None, "stop_token": None, "error": None}
    if len(delta.prompt_logprobs) > 1 or (delta.prompt_logprobs and delta.tokens):
        half = -(-len(delta.prompt_logprobs) // 2)
        head = {"tokens": (), "logprobs": (), "prompt_logprobs": delta.prompt_logprobs[:half], **quiet}
        yield from _cut(delta.model_copy(update=head), limit)
        tail = {"prompt_logprobs": delta.prompt_logprobs[half:], "prompt_start": delta.prompt_start + half}
        yield from _cut(delta.model_copy(update=tail), limit)
    elif len(delta.tokens) > 1:
        half = len(delta.tokens) // 2
        head = {"tokens": delta.tokens[:half], "logprobs": delta.logprobs[:half], **quiet}
        yield from _cut(delta.model_copy(update=head), limit)
        tail = {"tokens": delta.tokens[half:], "logprobs": delta.logprobs[half:], "position": delta.position + half}
        yield from _cut(delta.model_copy(update=tail), limit)
    else:
        yield delta
