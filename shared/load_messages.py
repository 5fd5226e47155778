"""What instances tell the scheduler of loads: what is activated and foreseen, by layer; and what gateways serve."""

from typing import Annotated

from pydantic import Field

from shared.messages import U64, Count, Message

WAIT_EDGES = tuple(1e-4 * 1.25**step for step in range(64))
"""Seconds: from 0.1 ms to two minutes, each a quarter more than the one before."""

Seconds = Annotated[float, Field(ge=0, le=1e9)]
Counted = Annotated[int, Field(ge=0, lt=1 << 32)]


class Activated(Message):
    """Attention -> scheduler, published: which experts the latest exchanges of one layer have activated.

    Exchanges are a sample when there were many. Activation and co-activation counts follow from the masks.
    """

    attention: str
    incarnation: U64
    layer: Count
    """Checkpoint index."""
    experts: Count
    seconds: Seconds
    """How long ago the first of them was."""
    rows: Count
    """Tokens in all of them."""
    masks: bytes
    """uint64 little-endian [exchanges, words of 64 experts], oldest first; bit e % 64 of word e // 64: expert e."""


class Foreseen(Message):
    """Expert instance -> scheduler, published once a second: what its predictor said of one layer since then."""

    instance: str
    incarnation: U64
    layer: Count
    """Checkpoint index of the layer whose loads these are."""
    experts: Count
    exchanges: Annotated[int, Field(ge=1)]
    """How many were foreseen."""
    sums: bytes
    """fp32 little-endian [2, experts], over these exchanges: expected rows, and probability of being activated."""
    prefill_exchanges: Count = 0
    """How many of them were of steps that compute prompts,"""
    prefill_sums: bytes = b""
    """and the sums over these; empty: there were none."""


class Waits(Message):
    """Times as a histogram with the edges WAIT_EDGES, and their sum."""

    counts: Annotated[tuple[Counted, ...], Field(min_length=len(WAIT_EDGES) + 1, max_length=len(WAIT_EDGES) + 1)]
    """At or below each edge and above the one before; the last: above all of them."""
    seconds: Seconds


class Served(Message):
    """Gateway -> scheduler, published once a second: what was asked of it since then, and what it has sent.

    A request is one choice: what an attention instance decodes as one sequence.
    """

    gateway: str
    incarnation: U64
    seconds: Seconds
    """That this covers."""
    arrived: Counted
    """Requests,"""
    prompt_tokens: Counted
    """and tokens of their prompts."""
    refused: Counted
    """Of these requests, because too many were open. One that a client sends again counts again: while an overload
    lasts, the rate is high by what is tried again rather than low by what is turned away."""
    output_tokens: Counted
    """Sent."""
    ended: Counted
    """Requests that got a token, for whatever reason,"""
    ended_tokens: Counted
    """and all tokens of their outputs."""
    open: Counted
    """Requests at this moment."""
    inter: Waits
    """Between two tokens of a request."""
    first: Waits
    """From a request's arrival to its first token."""
