"""What gateways and attention instances say to each other about requests: see shared/messages.py for the form.

A request goes out as ``Submit`` and is answered by a ``Decision``; its output comes as ``Tokens`` until all of it is
acknowledged (``Ack``), asked for again (``Resend``) or no longer wanted (``Cancel``).
"""

from typing import Annotated, Literal

from pydantic import Field

from shared.messages import U64, Count, Message


class SamplingParams(Message):
    """How to choose tokens. Neutral defaults; ranges are checked here once for every entrance."""

    max_tokens: Annotated[int, Field(ge=0)]
    temperature: Annotated[float, Field(ge=0, le=2, allow_inf_nan=False)] = 1.0
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    top_k: Annotated[int, Field(ge=0)] = 0
    """0 = off."""
    min_p: Annotated[float, Field(ge=0, le=1)] = 0.0
    seed: U64 = 0
    """Always set: the gateway draws one when the client gave none."""
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] = 0.0
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] = 0.0
    repetition_penalty: Annotated[float, Field(ge=1e-3, le=1e3)] = 1.0
    logit_bias: dict[int, float] = Field(default_factory=dict)
    min_tokens: Count = 0
    stop_token_ids: tuple[int, ...] = ()
    """Ends the output; includes the model's end-of-sequence ids unless ``ignore_eos`` was asked for."""
    logprobs: Annotated[int, Field(ge=-1, le=20)] = -1
    """-1 = none; otherwise how many alternatives to report beside the sampled token."""
    prompt_logprobs: Annotated[int, Field(ge=-1, le=20)] = -1


class Submit(Message):
    """Gateway -> attention, request/reply. Idempotent by ``request_id``.

    A prompt whose message would pass the size limit is sent as several messages with rising ``part``; only the
    last one is acknowledged with a decision, the earlier ones with ``Accepted``.
    """

    request_id: str
    gateway: str
    """Instance id whose tokens subject receives the output."""
    prompt: bytes
    """int32 little-endian token ids (of this part)."""
    sampling: SamplingParams
    deadline_s: Annotated[float, Field(gt=0)]
    """Seconds from receipt after which the request is dropped."""
    output: bytes = b""
    """int32 little-endian: tokens already delivered, when a request is resumed on another instance."""
    part: Count = 0
    parts: Annotated[int, Field(ge=1)] = 1
    may_wait: bool = False
    """Take it even while there are no experts: somebody sees to their pool."""
    trace: dict[str, str] = Field(default_factory=dict)
    """W3C trace context headers."""


RefusalCode = Literal[
    "full",  # the queue is full: try another instance or later
    "draining",  # the instance is leaving: try another
    "no_experts",  # no placement or no live home
    "too_long",  # prompt + max_tokens does not fit max_model_len or the KV cache
    "invalid",  # the request can never succeed
    "unknown",  # no such request here
    "deadline",  # the request's deadline passed
    "not_now",  # the mesh is not in a state to do this; the message says why
    "internal",  # a defect on our side, logged there
]


class Decision(Message):
    """Reply to Submit, Cancel and Resend: accepted, or refused with a reason."""

    ok: bool
    code: RefusalCode | None = None
    message: str = ""


class TokenLogprobs(Message):
    """Log-probabilities for one position, from the raw logits (before penalties and temperature)."""

    logprob: float | None
    """Of the token itself; None for the first prompt token."""
    rank: Count = 0
    top: tuple[tuple[int, float], ...] = ()
    """(token id, logprob), most probable first, ties to the lowest id."""


FinishReason = Literal["stop", "length", "cancelled", "error"]


class TokenDelta(Message):
    """Tokens of one request from ``position`` on (0 = first generated token)."""

    request_id: str
    position: Count
    tokens: tuple[int, ...]
    logprobs: tuple[TokenLogprobs, ...] = ()
    """One per token when asked for."""
    finish: FinishReason | None = None
    stop_token: int | None = None
    """Set when the last of ``tokens`` is a stop token: it counts as output, but has no text."""
    error: Decision | None = None
    """Set when ``finish`` is "error"."""
    prompt_logprobs: tuple[TokenLogprobs, ...] = ()
    """Sent once, with position 0; long ones in several deltas, those before the last without tokens."""
    prompt_start: Count = 0
    """Prompt position of the first of ``prompt_logprobs``."""


class Tokens(Message):
    """Attention -> gateway: the deltas of one step for all of this gateway's requests."""

    attention: str
    deltas: tuple[TokenDelta, ...]


class Ack(Message):
    """Gateway -> attention: everything below ``received[request_id]`` has arrived and may be forgotten.

    A finished request is acknowledged with ``done`` and then forgotten completely.
    """

    gateway: str
    received: dict[str, int] = Field(default_factory=dict)
    done: tuple[str, ...] = ()


class Resend(Message):
    """Gateway -> attention, request/reply: a gap or a second of silence; send again from ``position``."""

    request_id: str
    position: Count


class Cancel(Message):
    """Gateway -> attention, request/reply. Unknown ids are fine: the reply is ok either way."""

    request_id: str
