"""Which experts are resident on this instance: loads the homes of placements, lets go of those of old ones.

Runs beside the compute thread (``MoeLayer`` swaps its tables whole). With the `shared` store of the CPU a resident
expert is a view of the mapped checkpoint and costs no memory of its own.
"""

import time
from collections.abc import Iterable, Mapping, Sequence
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
        self._loaded_bytes, self._load_seconds = 0, 0.0

    @property
    def slots(self) -> int:
        """Most replicas; 0: no limit."""
        return self._slots

    @property
    def load_rate(self) -> float:
        """Bytes per second at which replicas were loaded so far; 0 before."""
        return self._loaded_bytes / self._load_seconds if self._load_seconds else 0.0

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
        needed = sum(map(len, homes_here(placement, self._instance).values()))
        if self._slots and needed > self._slots:
            raise StoreRefusal(
                f"placement {placement.version} gives this instance {needed} replicas, it has {self._slots} slots"
            )

    def plan(self, placements: Sequence[Placement]) -> Homes:
        """What should be resident for placements, oldest first: all homes of the newest, of others what fits beside.

        A layer is kept for an older one with all of its homes or not at all: it could not be answered otherwise.
        """
        plan: dict[int, frozenset[int]] = dict.fromkeys(self._layers, frozenset())
        for placement in reversed(placements):
            for layer, experts in homes_here(placement, self._instance).items():
                both = plan[layer] | experts
                spare = self._slots - sum(map(len, plan.values()))
                if placement is placements[-1] or not self._slots or len(both) - len(plan[layer]) <= spare:
                    plan[layer] = both
        return plan

    def layers_of(self, placement: Placement, plan: Homes | None = None) -> frozenset[int]:
        """Layers of which all homes here are resident, and stay so by ``plan``: those that can be answered."""
        homes = homes_here(placement, self._instance)
        kept = {i: layer.resident & plan[i] if plan else layer.resident for i, layer in self._layers.items()}
        return frozenset(index for index in self._layers if homes.get(index, frozenset()) <= kept[index])

    def keep_only(self, placements: Iterable[Placement]) -> None:
        """Let go of experts that are no home in any of ``placements``; nobody may be computing with them."""
        wanted: dict[int, frozenset[int]] = {}
        for placement in placements:
            for layer, experts in homes_here(placement, self._instance).items():
                wanted[layer] = wanted.get(layer, frozenset()) | experts
        for index, layer in self._layers.items():
            if surplus := layer.resident - wanted.get(index, frozenset()):
                layer.unload(surplus)

    def load_beside(self, plan: Homes) -> None:
        """Load what is planned where nothing has to go for it and slots are free. Raises ModelError."""
        for index, experts in plan.items():
            missing = experts - self._layers[index].resident
            room = not self._slots or self.replicas + len(missing) <= self._slots
            if room and self._layers[index].resident <= experts:
                self._load(index, missing)

    def become(self, plan: Homes) -> None:
        """Let go of all that is not planned and load what is; nobody may compute with what goes. Raises ModelError."""
        for index, layer in self._layers.items():
            if surplus := layer.resident - plan[index]:
                layer.unload(surplus)
        for index, experts in plan.items():
            self._load(index, experts - self._layers[index].resident)

    def _load(self, index: int, experts: frozenset[int]) -> None:
        if not experts:
            return
        layer, begun = self._layers[index], time.monotonic()
        before = layer.nbytes
        layer.load(experts)
        self._loaded_bytes += layer.nbytes - before
        self._load_seconds += time.monotonic() - begun
