"""Which experts are resident on this instance: loads the homes of a placement, lets go of those of an old one.

Runs beside the compute thread (``MoeLayer`` swaps its tables whole). With the `shared` store of the CPU a resident
expert is a view of the mapped checkpoint and costs no memory of its own.
"""

from collections.abc import Iterable, Mapping
from typing import Protocol

import numpy as np

from shared.activation import layer_homes
from shared.errors import MoemeshError
from shared.messages import Placement

Homes = Mapping[int, frozenset[int]]
"""Layer -> logical experts that have a home here."""


class ResidentLayer(Protocol):
    """What is asked of ``MoeLayer``."""

    @property
    def resident(self) -> frozenset[int]: ...

    @property
    def nbytes(self) -> int: ...

    def load(self, experts: Iterable[int]) -> None: ...

    def unload(self, experts: Iterable[int]) -> None: ...


class StoreRefusal(MoemeshError):
    """This instance cannot take a placement; says why."""


def homes_here(placement: Placement, instance: str) -> Homes:
    """The experts of every layer that have a home on ``instance``."""
    if instance not in placement.instances:
        return {}
    bit = np.uint64(1 << placement.instances.index(instance))
    return {layer: frozenset(np.flatnonzero(homes & bit).tolist()) for layer, homes in layer_homes(placement).items()}


class ExpertStore:
    """Resident experts of one instance; one thread at a time.

    Args:
        layers: by checkpoint index.
        slots: most replicas; 0: no limit.
        digest: of the model; placements of another one are refused.
        experts: routed experts per layer.
    """

    def __init__(
        self, layers: Mapping[int, ResidentLayer], *, instance: str, slots: int, digest: str, experts: int
    ) -> None:
        self._layers = layers
        self._instance = instance
        self._slots = slots
        self._digest = digest
        self._experts = experts

    @property
    def replicas(self) -> int:
        """Resident replicas."""
        return sum(len(layer.resident) for layer in self._layers.values())

    @property
    def nbytes(self) -> int:
        """Bytes of their weights; on CPU most are mapped and shared with other instances."""
        return sum(layer.nbytes for layer in self._layers.values())

    def check(self, placement: Placement) -> None:
        """Raises StoreRefusal when the placement is for another model or needs more slots than there are."""
        if placement.digest != self._digest:
            raise StoreRefusal(f"placement {placement.version} is for another model ({placement.digest[:12]})")
        shape = len(placement.moe_layers), placement.experts
        if set(placement.moe_layers) != self._layers.keys() or placement.experts != self._experts:
            raise StoreRefusal(f"placement {placement.version} has other layers or experts than the model")
        if len(placement.homes) != shape[0] * shape[1] * 8:
            raise StoreRefusal(f"placement {placement.version} holds {len(placement.homes)} bytes of homes")
        needed = self._needed([placement])
        if self._slots and needed > self._slots:
            raise StoreRefusal(
                f"placement {placement.version} gives this instance {needed} replicas, it has {self._slots} slots"
            )

    def fits(self, placements: Iterable[Placement]) -> bool:
        """True when the homes of all these placements can be resident together."""
        return not self._slots or self._needed(placements) <= self._slots

    def load(self, placement: Placement) -> None:
        """Make the homes of a placement resident beside what is. Raises ModelError."""
        for layer, experts in homes_here(placement, self._instance).items():
            self._layers[layer].load(experts - self._layers[layer].resident)

    def keep_only(self, placements: Iterable[Placement]) -> None:
        """Let go of experts that are no home in any of ``placements``; nobody may be computing with them."""
        wanted = self._union(placements)
        for index, layer in self._layers.items():
            if surplus := layer.resident - wanted.get(index, frozenset()):
                layer.unload(surplus)

    def _needed(self, placements: Iterable[Placement]) -> int:
        return sum(map(len, self._union(placements).values()))

    def _union(self, placements: Iterable[Placement]) -> Homes:
        union: dict[int, frozenset[int]] = {}
        for placement in placements:
            for layer, experts in homes_here(placement, self._instance).items():
                union[layer] = union.get(layer, frozenset()) | experts
        return union
