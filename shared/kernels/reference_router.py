"""How scores become experts and weights, in plain torch; see ``RouterSpec`` and ``Kernels.route``."""

import torch
from torch import Tensor

from shared.models.spec import RouterSpec


def choose(logits: Tensor, router: RouterSpec, correction: Tensor | None) -> tuple[Tensor, Tensor]:
    """logits fp32 [T, E] -> (weights fp32 [T, k], ids int64 [T, k]), best first, ties to the lowest id."""
    if router.score == "sparsemixer":
        weights, ids = _sparsemixer(logits, router)
    else:
        scores = _scores(logits, router.score)
        ids = _best(_eligible(scores, router, correction), router.top_k)
        weights = scores.gather(1, ids)
    if router.score == "top_softmax":
        weights = weights.softmax(-1)
    if router.score == "top_sigmoid":
        weights = weights.sigmoid()
    if router.normalise:
        weights = weights / weights.sum(-1, keepdim=True)
    return weights * router.scale, ids


def _scores(logits: Tensor, score: str) -> Tensor:
    if score == "softmax":
        return logits.softmax(-1)
    if score == "sigmoid":
        return logits.sigmoid()
    if score in ("top_softmax", "top_sigmoid"):
        return logits
    raise ValueError(f"unknown gate score {score!r}")


def _best(scores: Tensor, count: int) -> Tensor:
    return scores.sort(dim=-1, descending=True, stable=True).indices[:, :count]


def _eligible(scores: Tensor, router: RouterSpec, correction: Tensor | None) -> Tensor:
    """What the choice goes by: corrected scores, -inf in groups that are not among the best."""
    if correction is not None:
        scores = scores + correction.float()
    if router.groups == 1:
        return scores
    grouped = scores.view(len(scores), router.groups, -1)
    worth = grouped.amax(-1) if router.group_score == "max" else grouped.topk(2, dim=-1).values.sum(-1)
    allowed = torch.zeros_like(worth, dtype=torch.bool).scatter_(1, _best(worth, router.top_groups), True)
    return grouped.masked_fill(~allowed[..., None], float("-inf")).flatten(1)


def _sparsemixer(logits: Tensor, router: RouterSpec) -> tuple[Tensor, Tensor]:
    weights, ids, left = [], [], logits
    for _ in range(router.top_k):
        best = _best(left, 1)
        top = left.gather(1, best)
        distant = (top - logits) / torch.maximum(logits.abs(), top) > 2 * router.jitter
        share = left.masked_fill(distant, float("-inf")).softmax(-1)
        weights.append(share.gather(1, best))
        ids.append(best)
        left = left.scatter(1, best, float("-inf"))
    return torch.cat(weights, dim=1), torch.cat(ids, dim=1)
