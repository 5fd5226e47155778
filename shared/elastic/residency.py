"""Which experts an instance keeps resident: pure decisions on arrays, given calls, predictions and time.

All layers share one budget of slots; who makes room is decided by worth.py, for the replay too.
Arrays are [layers, experts]; layers count from 0 among those with experts.
"""

from dataclasses import dataclass
from enum import IntEnum

import numpy as np
from numpy.typing import NDArray

from shared.elastic.eviction import Eviction
from shared.elastic.worth import UNKNOWN, WORTH, chances_of, note_calls, worths_of

Booleans = NDArray[np.bool_]


class Residence(IntEnum):
    ABSENT = 0
    LOADING = 1
    RESIDENT = 2


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
        self._share = np.zeros(shape, np.float32)
        """Of the exchanges that call it, the recent ones weighing most."""
        self._soon = np.full(shape, UNKNOWN, np.float32)
        """Predicted probability for the coming exchange of the layer, or UNKNOWN."""
        self._compile()

    def _compile(self) -> None:
        """Before the first exchange, which must not wait for it."""
        note_calls(self._share[0], self.homes[0])
        chances_of(self._share[0])
        worths_of(self._share, self._soon)

    @property
    def free(self) -> int:
        """Slots that nobody has."""
        return self._slots - int(np.count_nonzero(self.state))

    def adopt(self, homes: Booleans) -> list[tuple[int, int]]:
        """Homes bool [layers, experts] from now on. Returns residents that have none any more."""
        self.homes = homes.copy()
        return _pairs((self.state == Residence.RESIDENT) & ~homes)

    def homeless(self) -> list[tuple[int, int]]:
        """Residents that have lost their home while they were loaded."""
        return _pairs((self.state == Residence.RESIDENT) & ~self.homes)

    def missing(self, layer: int, experts: NDArray[np.integer]) -> NDArray[np.integer]:
        """Those of ``experts`` that are not resident."""
        return experts[self.state[layer, experts] != Residence.RESIDENT]

    def call(self, layer: int, experts: NDArray[np.integer], now: float) -> None:
        """An exchange calls these experts (unique ids): the first look at it, whether they are resident or not."""
        called = np.zeros(self._share.shape[1], np.bool_)
        called[experts] = True
        note_calls(self._share[layer], called)
        self.called_at[layer, experts] = now
        self._soon[layer] = UNKNOWN

    def demand(self, layer: int, experts: NDArray[np.integer]) -> list[Start]:
        """Start what is absent of these: an exchange waits, so that every resident may make room.

        Fewer than asked for when too few slots are left by those that are loading: ask again when they have.
        """
        absent = experts[self.state[layer, experts] == Residence.ABSENT]
        return self._starts(layer, absent, np.full(len(absent), np.inf))

    def predict(self, layer: int, loads: NDArray[np.floating]) -> list[Start]:
        """Expected rows [experts] of the coming exchange of ``layer``: start what is worth it, most probable first."""
        if self._eviction is Eviction.LRU:
            return []
        chance = self._soon[layer] = chances_of(np.asarray(loads, np.float32))
        wanted = self.homes[layer] & (self.state[layer] == Residence.ABSENT) & (chance >= WORTH)
        experts = np.flatnonzero(wanted)
        if not len(experts):
            return []
        experts = experts[np.argsort(-chance[experts], kind="stable")]
        return self._starts(layer, experts, self.worth()[layer, experts])

    def worth(self) -> NDArray[np.floating]:
        """What a slot is worth to each expert, [layers, experts]."""
        return worths_of(self._share, self._soon)

    def loaded(self, layer: int, expert: int, now: float) -> None:
        """A start has ended well."""
        self.state[layer, expert] = Residence.RESIDENT
        self.called_at[layer, expert] = now

    def gone(self, layer: int, expert: int) -> None:
        """It is not resident any more, or could not be started."""
        self.state[layer, expert] = Residence.ABSENT

    def idle(self, wanted: Booleans, before: float) -> list[tuple[int, int]]:
        """Residents that nobody wants, bool [layers, experts], and that were neither called nor started since."""
        return _pairs((self.state == Residence.RESIDENT) & ~wanted & (self.called_at < before))

    def revive(self, wanted: Booleans) -> list[Start]:
        """Start on free slots what is wanted again before anybody calls it, the most habitual first."""
        absent = np.flatnonzero((wanted & self.homes & (self.state == Residence.ABSENT)).ravel())
        order = absent[np.argsort(-self._share.ravel()[absent], kind="stable")][: self.free]
        self.state.ravel()[order] = Residence.LOADING
        return [Start(*divmod(int(i), self.state.shape[1])) for i in order]

    def _starts(self, layer: int, experts: NDArray[np.integer], worth: NDArray[np.floating]) -> list[Start]:
        """Take slots for ``experts``, worth most first: free ones, then those of experts that are worth less."""
        starts: list[Start] = []
        free = self.free
        victims = iter(self._victims(len(experts) - free)) if len(experts) > free else iter(())
        for expert, value in zip(experts.tolist(), worth.tolist(), strict=True):
            victim = None
            if len(starts) >= free:
                found = next(victims, None)
                if found is None or found[1] >= value:
                    break
                victim = found[0]
                self.state[victim] = Residence.ABSENT
            self.state[layer, expert] = Residence.LOADING
            starts.append(Start(layer, expert, victim))
        return starts

    def _victims(self, count: int) -> list[tuple[tuple[int, int], float]]:
        """The ``count`` residents that should go first, and what their slots are worth to them."""
        worth = self.called_at if self._eviction is Eviction.LRU else self.worth()
        worth = np.where(self.state == Residence.RESIDENT, worth, np.inf).ravel()
        order = np.argpartition(worth, min(count, worth.size) - 1)[:count]
        order = order[np.argsort(worth[order], kind="stable")]
        width = self.state.shape[1]
        return [(divmod(int(i), width), float(worth[i])) for i in order if np.isfinite(worth[i])]


def _pairs(mask: Booleans) -> list[tuple[int, int]]:
    return [(int(layer), int(expert)) for layer, expert in np.argwhere(mask)]
