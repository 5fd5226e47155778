"""Stands in for CUDA graphs where there is no GPU: the order of things is that of the real ones, the work is eager."""

from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")


class Pretended:
    """See ``Capturing``: a capture computes nothing, a replay does what the call does."""

    def __init__(self) -> None:
        self.captured = 0

    def run(self, call: Callable[[], T]) -> T:
        return call()

    def capture(self, call: Callable[[], T]) -> Callable[[], T]:
        self.captured += 1
        return call
