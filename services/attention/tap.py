"""Follows what the rows of this instance choose, exchange by exchange, in the compute thread.

Always: the ring of activations. While somebody records: the ids themselves (recording.py).
"""

from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from services.attention.activations import ActivationRing
from services.attention.recording import Recording
from shared.metrics import Sample, sample

_U64 = (1 << 64) - 1


class RoutingTap:
    """``begin`` and ``combined`` belong to the compute thread. ``layers`` and ``experts`` as of the model.

    ``first``: 64 random bits, from which steps are counted: their numbers are unique among instances.
    """

    def __init__(self, layers: Sequence[int], experts: int, first: int) -> None:
        self.experts = experts
        self.ring = ActivationRing(layers, experts)
        self.recording = Recording(experts)
        self._own = self._step = first

    def begin(self, group: int) -> None:
        """A step begins: one of the group with this number, which all members give it; 0: of this instance alone."""
        self._own = (self._own + 1) & _U64
        self._step = group or self._own

    def combined(self, layer: int, experts: NDArray[np.uint32]) -> None:
        """An exchange is complete, of our rows or of a group that we lead; ``experts`` [T, k] ascend in every row."""
        self.ring.mark(layer, experts)
        if self.recording.on:
            self.recording.add(layer, self._step, experts)

    def samples(self) -> Iterator[Sample]:
        """For /metrics."""
        yield sample("trace_recorders", self.recording.recorders)
        yield sample("trace_dropped", self.recording.dropped)
