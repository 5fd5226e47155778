"""One exchange on the experts' side: gate all rows, choose replicas, plan the parts that are ours; or as routes say.

Arrays in, arrays out; knows neither senders nor placements; parts are computed in shared/models/moe.py. The same rows,
homes and live mask give the same result on every instance, which is why an exchange may be repeated.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from shared.activation import PARTS, Choice, NoLiveHome, Parts, own_parts, plan_exchange, write_parts
from shared.errors import BadFrame
from shared.exchange_frames import Routes
from shared.models.moe import ExpertLayer, compute_parts, weights_of_sum


@dataclass(frozen=True, slots=True)
class Plan:
    """What one instance does in an exchange of T rows."""

    parts: Parts
    """Their tokens are rows of the frame."""
    weights: NDArray[np.float32]
    """Of the parts in their sum."""
    digest: int
    """Of the choices for all rows, the same on every instance."""
    ids: NDArray[np.int32]
    """[T, k]: all choices of the rows."""
    tokens: NDArray[np.int32]
    """Of the parts, as the reply names them."""


def answer(
    layer: ExpertLayer,
    rows: Tensor,
    choice: Choice,
    meta: NDArray[np.uint8],
    out: Tensor,
    counts: NDArray[np.int64],
) -> tuple[int, int]:
    """Gate rows [T, H] and compute the P parts of an instance. Returns P and the digest of all choices.

    Args:
        meta: uint8 [>= 12 * P], gets PARTS and zeros.
        out: fp32 [>= P, H], gets the parts, which are not weighted.
        counts: int64 [2, experts], counts the parts of each expert, and the exchanges that activated it.

    Raises NoLiveHome.
    """
    at_once = layer.answering(rows)
    if at_once is not None:
        return at_once(rows, choice, meta, out, counts)
    return carry_out(plan_parts(layer, rows, choice), layer, rows, meta, out, counts)


def carry_out(
    plan: Plan,
    layer: ExpertLayer,
    rows: Tensor,
    meta: NDArray[np.uint8],
    out: Tensor,
    counts: NDArray[np.int64],
    done: Tensor | None = None,
) -> tuple[int, int]:
    """What ``answer`` does once it is known which parts are ours. ``done`` fp32 [P, H]: their rows, if computed."""
    parts = len(plan.weights)
    if done is None:
        compute_parts(layer, rows, plan.parts, out[:parts])
    else:
        out[:parts] = done
    write_parts(meta[: parts * PARTS.itemsize], plan.tokens, plan.parts.experts, plan.weights)
    meta[parts * PARTS.itemsize :] = 0
    count_parts(counts, plan.parts)
    return parts, plan.digest


def plan_routed(layer: ExpertLayer, routes: Routes, homes: NDArray[np.uint64], instance: int, digest: int) -> Plan:
    """The parts of an instance as ``routes`` say; tokens of parts are rows of the frame.

    Raises NoLiveHome when an expert has no home here, BadFrame when an id is none of an expert.
    """
    if routes.ids.size and (routes.ids.min() < 0 or routes.ids.max() >= len(homes)):
        raise BadFrame(f"expert ids must be in 0..{len(homes) - 1}")
    parts = own_parts(routes.ids, routes.replicas, routes.weights, instance)
    strangers = parts.experts[homes[parts.experts] >> np.uint64(instance) & np.uint64(1) == 0]
    if len(strangers):
        raise NoLiveHome(int(strangers[0]))
    return Plan(parts, weights_of_sum(layer, parts), digest, routes.ids, routes.tokens[parts.tokens])


def count_parts(counts: NDArray[np.int64], parts: Parts) -> None:
    """counts int64 [2, experts]: parts of each expert, and exchanges that activated it."""
    np.add.at(counts[0], parts.experts, 1)
    counts[1, np.unique(parts.experts)] += 1


def plan_parts(layer: ExpertLayer, rows: Tensor, choice: Choice) -> Plan:
    """Gate rows [T, H] and pick the parts of an instance. Raises NoLiveHome."""
    if len(rows) == 0:
        nothing = np.empty(0, np.int32)
        none = Parts(nothing, nothing, np.empty(0, np.float32))
        return Plan(none, none.weights, 0, nothing[:, None], nothing)
    weights, ids = (tensor.numpy(force=True) for tensor in layer.gate(rows))
    parts, digest = plan_exchange(ids, weights, choice)
    return Plan(parts, weights_of_sum(layer, parts), digest, ids, parts.tokens)
