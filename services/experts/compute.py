"""One exchange on the experts' side: gate all rows, choose replicas, compute the parts that are ours.

Arrays in, arrays out; knows neither senders nor placements. The same rows, homes and live mask give the same result on
every instance, which is why an exchange may be repeated.
"""

from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from shared.activation import choose_replicas, exchange_digest, own_parts


class ExpertLayer(Protocol):
    """What is asked of ``MoeLayer``."""

    @property
    def weighs_input(self) -> bool: ...

    def gate(self, rows: Tensor) -> tuple[Tensor, Tensor]: ...

    def forward(self, rows: Tensor, tokens: Tensor, ids: Tensor, weights: Tensor, out: Tensor) -> None: ...


@dataclass(frozen=True, slots=True)
class Plan:
    """The parts of one instance in ascending order of (expert, token), P of them."""

    tokens: NDArray[np.int32]
    experts: NDArray[np.int32]
    weights: NDArray[np.float32]
    """Of the parts in their sum."""
    digest: int
    """Of the choices for all rows, the same on every instance."""
    input_weights: NDArray[np.float32]
    """What ``forward`` is told: the gate's weights."""


def plan_parts(layer: ExpertLayer, rows: Tensor, homes: NDArray[np.uint64], live: int, instance: int) -> Plan:
    """Gate rows [T, H] and pick the parts of ``instance``. Raises NoLiveHome."""
    if len(rows) == 0:
        nothing = np.empty(0, np.int32)
        return Plan(nothing, nothing, np.empty(0, np.float32), 0, np.empty(0, np.float32))
    weights, ids = (tensor.numpy(force=True) for tensor in layer.gate(rows))
    replicas = choose_replicas(ids, homes, live)
    tokens, experts, own = own_parts(ids, replicas, weights, instance)
    summed = np.ones_like(own) if layer.weighs_input else own
    return Plan(tokens, experts, summed, exchange_digest(ids, replicas), own)


def compute_parts(layer: ExpertLayer, rows: Tensor, plan: Plan, out: Tensor) -> None:
    """out fp32 [P, H] = the planned experts applied to their rows of rows [T, H], not weighted."""
    if len(plan.tokens):
        arrays = (plan.tokens, plan.experts, plan.input_weights)
        tokens, experts, weights = (torch.from_numpy(array).to(rows.device) for array in arrays)
        layer.forward(rows, tokens, experts, weights, out)
