"""Which experts the latest exchanges have activated: a sliding window for every layer. Pure; the caller gives the time.

Bounded by exchanges and by age. Attention instances may send samples only, so that rates are lower bounds.
"""

from collections import deque
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from shared.errors import BadMessage
from shared.load_messages import Activated
from shared.placement.replacement import Floats

MOST_EXCHANGES = 512
"""Of one layer."""
OLDEST_S = 900.0
FEWEST_EXCHANGES = 16
"""Fewer say nothing about what comes."""


@dataclass(frozen=True)
class Seen:
    """The exchanges of one layer."""

    active: NDArray[np.bool_]
    """[exchanges, experts]"""
    seconds: float
    """Since the first of them."""

    @property
    def activity(self) -> Floats:
        """[experts]: share of the exchanges in which an expert was activated."""
        return self.active.mean(axis=0)

    @property
    def together(self) -> Floats:
        """[experts, experts]: share of the exchanges in which two were."""
        active = self.active.astype(np.float64)
        return active.T @ active / len(active)

    @property
    def rate(self) -> float:
        """Exchanges per second, at least."""
        return len(self.active) / max(self.seconds, 1e-3)


@dataclass
class _Layer:
    experts: int
    batches: deque[tuple[float, NDArray[np.uint64]]] = field(default_factory=deque)
    """(time of the first exchange, masks [exchanges, words]), oldest first."""

    def forget(self, now: float) -> None:
        held = sum(len(masks) for _, masks in self.batches)
        while self.batches:
            first, masks = self.batches[0]
            if held - len(masks) < MOST_EXCHANGES and now - first <= OLDEST_S:
                return
            held -= len(masks)
            self.batches.popleft()


class Window:
    """Made of ``Activated`` messages."""

    def __init__(self) -> None:
        self._layers: dict[int, _Layer] = {}

    def add(self, message: Activated, now: float) -> None:
        """Take in what one attention instance has seen. Raises BadMessage for masks of a wrong size."""
        words = -(-message.experts // 64)
        if not words or len(message.masks) % (8 * words):
            raise BadMessage("Activated", f"{len(message.masks)} bytes of masks for {message.experts} experts")
        layer = self._layers.get(message.layer)
        if layer is None or layer.experts != message.experts:  # the latter: another model
            layer = self._layers[message.layer] = _Layer(message.experts)
        masks = np.frombuffer(message.masks, "<u8").reshape(-1, words)[-MOST_EXCHANGES:]
        if len(masks):
            layer.batches.append((now - message.seconds, masks))
        layer.forget(now)

    def seen(self, layer: int, experts: int, now: float) -> Seen | None:
        """The latest exchanges of a layer (checkpoint index), None when there are too few."""
        found = self._layers.get(layer)
        if found is None or found.experts != experts:
            return None
        found.forget(now)
        if sum(len(masks) for _, masks in found.batches) < FEWEST_EXCHANGES:
            return None
        masks = np.concatenate([masks for _, masks in found.batches])
        bits = np.unpackbits(masks.astype("<u8").view(np.uint8), axis=1, bitorder="little")
        first = min(time for time, _ in found.batches)
        return Seen(bits[:, :experts].astype(np.bool_), now - first)
