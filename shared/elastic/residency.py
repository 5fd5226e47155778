"""Which experts an instance keeps resident: pure decisions on arrays, given calls, predictions and time.

All layers share one budget of slots. An expert that exchanges of its layer call with probability p is expected to be
called after d + L (1 / p - 1) exchanges, where d is the distance to its layer and L the number of layers; who is needed
last makes room (Belady's rule, 1966). A prediction for the coming exchange of a layer replaces p for that exchange.
Arrays are [layers, experts]; layers count from 0 among those with experts.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum, StrEnum

import numpy as np
from numpy.typing import NDArray

Booleans = NDArray[np.bool_]
FORGET = 0.02
"""Weight of the newest exchange in the share of exchanges that call an expert."""
LEAST = 1e-3
"""No expert is taken for less probable."""
WORTH = 0.25
"""Experts that are predicted to be called with this probability or more are started ahead."""


class Residence(IntEnum):
    ABSENT = 0
    LOADING = 1
    RESIDENT = 2


class Eviction(StrEnum):
    """Who makes room."""

    FORESEEN = "foreseen"
    """What is expected to be called last."""
    LRU = "lru"
    """What was called longest ago; nothing is started ahead."""


@dataclass(frozen=True)
class Start:
    """An expert to load, and whose slot it gets: that of ``victim``, or a free one if that is None."""

    layer: int
    expert: int
    victim: tuple[int, int] | None = None


class Residency:
    """The table of one instance. Belongs to one thread.

    Args:
        layers, experts: its shape.
        slots: most experts that are resident or loading, all layers together.
    """

    def __init__(self, layers: int, experts: int, slots: int, eviction: Eviction = Eviction.FORESEEN) -> None:
        shape = layers, experts
        self.state = np.zeros(shape, np.uint8)
        self.homes = np.zeros(shape, np.bool_)
        self.called_at = np.zeros(shape)
        """When an expert was called or started last."""
        self._slots, self._eviction = slots, eviction
        self._share = np.full(shape, LEAST, np.float32)
        """Of the exchanges that call it, the recent ones weighing most."""
        self._soon = np.full(shape, -1.0, np.float32)
        """Predicted probability for the coming exchange of the layer; < 0: no prediction."""
        self._distance = np.arange(layers)

    @property
    def free(self) -> int:
        """Slots that nobody has."""
        return self._slots - int(np.count_nonzero(self.state))

    def adopt(self, homes: Booleans) -> list[tuple[int, int]]:
        """Homes bool [layers, experts] from now on. Returns residents that have none any more."""
        self.homes = homes.copy()
        return _pairs((self.state == Residence.RESIDENT) & ~homes)

    def missing(self, layer: int, experts: NDArray[np.integer]) -> NDArray[np.integer]:
        """Those of ``experts`` that are not resident."""
        return experts[self.state[layer, experts] != Residence.RESIDENT]

    def call(self, layer: int, experts: NDArray[np.integer], now: float) -> None:
        """An exchange calls these experts (unique ids): the first look at it, whether they are resident or not."""
        share = self._share[layer]
        share *= 1 - FORGET
        share[experts] += FORGET
        self.called_at[layer, experts] = now
        self._soon[layer] = -1.0
        self._distance = (np.arange(len(self.state)) - layer - 1) % len(self.state) + 1

    def demand(self, layer: int, experts: NDArray[np.integer]) -> list[Start]:
        """Start what is absent of these: an exchange waits, so that every resident may make room.

        Fewer than asked for when too few slots are left by those that are loading: ask again when they have.
        """
        absent = experts[self.state[layer, experts] == Residence.ABSENT]
        return self._starts(layer, absent, np.full(len(absent), -np.inf))

    def predict(self, layer: int, loads: NDArray[np.floating]) -> list[Start]:
        """Expected rows [experts] of the coming exchange of ``layer``: start what is worth it, most probable first."""
        if self._eviction is Eviction.LRU:
            return []
        chance = 1 - np.exp(-np.maximum(loads, 0))
        self._soon[layer] = chance
        wanted = self.homes[layer] & (self.state[layer] == Residence.ABSENT) & (chance >= WORTH)
        experts = np.flatnonzero(wanted)
        if not len(experts):
            return []
        experts = experts[np.argsort(-chance[experts], kind="stable")]
        return self._starts(layer, experts, self.next_call()[layer, experts])

    def next_call(self) -> NDArray[np.floating]:
        """Exchanges until an expert is expected to be called, [layers, experts]."""
        layers, share = len(self.state), np.maximum(self._share, LEAST)
        later = layers / share
        chance = np.where(self._soon >= 0, self._soon, share)
        return self._distance[:, None] + (1 - chance) * later

    def loaded(self, layer: int, expert: int, now: float) -> None:
        """A start has ended well."""
        self.state[layer, expert] = Residence.RESIDENT
        self.called_at[layer, expert] = now

    def gone(self, layer: int, expert: int) -> None:
        """It is not resident any more, or could not be started."""
        self.state[layer, expert] = Residence.ABSENT

    def idle(self, before: NDArray[np.floating] | float) -> list[tuple[int, int]]:
        """Residents that were not called since ``before`` (one time, or [layers, experts])."""
        return _pairs((self.state == Residence.RESIDENT) & (self.called_at < before))

    def _starts(self, layer: int, experts: Sequence[int] | NDArray, urgency: NDArray) -> list[Start]:
        """Take slots for ``experts``: free ones, then those whose experts are needed later than ``urgency`` says."""
        starts: list[Start] = []
        free = self.free
        victims = iter(self._victims(len(experts) - free)) if len(experts) > free else iter(())
        for expert, until in zip(experts, urgency, strict=True):
            victim = None
            if len(starts) >= free:
                found = next(victims, None)
                if found is None or found[1] <= until:
                    break
                victim = found[0]
                self.state[victim] = Residence.ABSENT
            self.state[layer, expert] = Residence.LOADING
            starts.append(Start(layer, int(expert), victim))
        return starts

    def _victims(self, count: int) -> list[tuple[tuple[int, int], float]]:
        """The ``count`` residents that should go first, and how late they are needed."""
        late = -self.called_at if self._eviction is Eviction.LRU else self.next_call()
        late = np.where(self.state == Residence.RESIDENT, late, -np.inf).ravel()
        order = np.argsort(-late, kind="stable")[:count]
        width = self.state.shape[1]
        return [(divmod(int(i), width), float(late[i])) for i in order if np.isfinite(late[i])]


def _pairs(mask: Booleans) -> list[tuple[int, int]]:
    return [(int(layer), int(expert)) for layer, expert in np.argwhere(mask)]
