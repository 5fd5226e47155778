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

    def gate(self, rows: Tensor) -> tuple[Tensor, Tensor]: ...

    def forward(self, rows: Tensor, tokens: Tensor, ids: Tensor, out: Tensor) -> None: ...


@dataclass(frozen=True, slots=True)
class Plan:
    """The parts of one instance in ascending order of (expert, token), P of them."""

    tokens: NDArray[np.int32]
    experts: NDArray[np.int32]
    weights: NDArray[np.float32]
    digest: int
    """Of the choices for all rows, the same on every instance."""


def plan_parts(layer: ExpertLayer, rows: Tensor, homes: NDArray[np.uint64], live: int, instance: int) -> Plan:
    """Gate rows [T, H] and pick the parts of ``instance``. Raises NoLiveHome."""
    if len(rows) == 0:
        nothing = np.empty(0, np.int32)
        return Plan(nothing, nothing, np.empty(0, np.float32), 0)
    weights, ids = (tensor.numpy(force=True) for tensor in layer.gate(rows))
    replicas = choose_replicas(ids, homes, live)
    return Plan(*own_parts(ids, replicas, weights, instance), exchange_digest(ids, replicas))


def compute_parts(layer: ExpertLayer, rows: Tensor, plan: Plan, out: Tensor) -> None:
    """out fp32 [P, H] = the planned experts applied to their rows of rows [T, H], not weighted."""
    if len(plan.tokens):
        tokens, experts = torch.from_numpy(plan.tokens), torch.from_numpy(plan.experts)
        layer.forward(rows, tokens.to(rows.device), experts.to(rows.device), out)
