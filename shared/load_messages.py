"""What instances tell the scheduler of loads, layer by layer: what was activated, and what is foreseen to be."""

from typing import Annotated

from pydantic import Field

from shared.messages import U64, Count, Message


class Activated(Message):
    """Attention -> scheduler, published: which experts the latest exchanges of one layer have activated.

    Exchanges are a sample when there were many. Activation and co-activation counts follow from the masks.
    """

    attention: str
    incarnation: U64
    layer: Count
    """Checkpoint index."""
    experts: Count
    seconds: Annotated[float, Field(ge=0)]
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
