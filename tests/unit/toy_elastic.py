"""Toy instances whose experts come and go: real slots and starts, and experts that compute what is in their slots."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, cast

import numpy as np
import torch

from services.experts.elastic import Elastic
from services.experts.starts import Starts
from shared.elastic.eviction import Eviction
from shared.elastic.keep_alive import Fixed
from shared.elastic.residency import Residency
from shared.errors import ModelError
from shared.kernels.weights import Weight
from shared.models.slots import HostSlots
from shared.predictors.base import Predictor
from shared.transport.memory import MemoryTransport
from tests.unit.toy_experts import EXPERTS, LAYERS, ToyLayer


class ElasticToyLayer(ToyLayer):
    """Computes with the weights that it holds, and with no others."""

    def __init__(self, layer: int) -> None:
        super().__init__(layer)
        self.held: dict[int, Sequence[Weight]] = {}

    def weights(self, expert: int) -> tuple[torch.Tensor, torch.Tensor]:
        return torch.from_numpy(self._scale[expert]), torch.from_numpy(self._shift[expert])

    def hold(self, weights: Mapping[int, Sequence[Weight]]) -> None:
        self.held |= weights

    def unload(self, experts: Iterable[int]) -> None:
        for expert in experts:
            del self.held[expert]

    def expert(self, expert: int, row: np.ndarray) -> np.ndarray:
        scale, shift = (cast(torch.Tensor, w).numpy() for w in self.held[expert])
        return np.tanh(row * scale + shift).astype(np.float32)


class ToyCheckpoint:
    def check_files(self) -> None:
        """There are none."""

    def let_go(self) -> None:
        """Nothing is mapped."""

    def is_view(self, tensor: torch.Tensor) -> bool:
        return False

    def read(self, tensor: torch.Tensor, address: int) -> bool:
        return False


Broken = Callable[[int, int], bool]
"""(layer, expert) -> whether its start fails."""


def elastic_with(
    slots: int,
    *,
    eviction: Eviction = Eviction.FORESEEN,
    predictor: Predictor | None = None,
    broken: Broken = lambda layer, expert: False,
    keep_alive: float = 0.0,
) -> Callable[[MemoryTransport], tuple[Mapping[int, ToyLayer], Elastic]]:
    """For ``toy_mesh``: instances with so many slots for all layers together."""

    def make(transport: MemoryTransport) -> tuple[Mapping[int, ToyLayer], Elastic]:
        layers = {layer: ElasticToyLayer(layer) for layer in LAYERS}

        def read(checkpoint: Any, layer: int, expert: int) -> tuple[Weight, ...]:
            if broken(layer, expert):
                raise ModelError("toy", f"expert {expert} is corrupt")
            return layers[layer].weights(expert)

        room = HostSlots(slots, layers[LAYERS[0]].weights(0))
        starts = Starts(lambda: cast(Any, ToyCheckpoint()), read, room, transport.wake)
        residency = Residency(len(LAYERS), EXPERTS, slots, eviction)
        policy = Fixed(len(LAYERS), EXPERTS, keep_alive) if keep_alive else None
        elastic = Elastic(layers, residency, starts, room, predictor, keep_alive=policy, slot_bytes=room.slot_bytes)
        elastic.adopt({layer: range(EXPERTS) for layer in LAYERS})
        return layers, elastic

    return make
