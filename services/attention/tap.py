"""Follows what the rows of this instance choose, exchange by exchange, in the compute thread.

Always: the ring of activations. While somebody records: the ids themselves (recording.py).
"""

import sys
from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from services.attention.activations import ActivationRing
from services.attention.recording import Recording
from shared.metrics import Sample, sample


class RoutingTap:
    """``dispatched`` and ``combined`` belong to the compute thread. ``layers`` and ``experts`` as of the model."""

    def __init__(self, layers: Sequence[int], experts: int) -> None:
        self.experts = experts
        self.ring = ActivationRing(layers, experts)
        self.recording = Recording(experts)
        self._step, self._layer = 0, sys.maxsize

    def dispatched(self, layer: int, alone: bool) -> None:
        """An exchange begins; ``alone``: no other one is open.

        A step goes upwards through the layers and its micro-batches overlap: one that does neither is the next step's.
        """
        if alone and layer <= self._layer:
            self._step += 1
        self._layer = layer

    def combined(self, layer: int, experts: NDArray[np.uint32]) -> None:
        """An exchange is complete; ``experts`` [T, k] ascend in every row."""
        self.ring.mark(layer, experts)
        if self.recording.on:
            self.recording.add(layer, self._step, experts)

    def samples(self) -> Iterator[Sample]:
        """For /metrics."""
        yield sample("trace_recorders", self.recording.recorders)
        yield sample("trace_dropped", self.recording.dropped)
