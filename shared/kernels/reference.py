"""The kernels in plain torch: the yardstick in tests, and what runs on CUDA.

Written to be read. Nothing here keeps a row's bits independent of its batch; see ``cpu`` for that.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from shared.kernels.base import ExpertTable, T
from shared.models.spec import RouterSpec


@dataclass(frozen=True)
class ReferenceTable:
    """Expert weights as they were given: logical id -> (gate, up, down)."""

    weights: dict[int, Sequence[Tensor]]

    @property
    def resident(self) -> frozenset[int]:
        return frozenset(self.weights)


def activate(x: Tensor, activation: str) -> Tensor:
    """silu, gelu (erf form) or gelu_pytorch_tanh. Raises ValueError for any other name."""
    if activation == "silu":
        return functional.silu(x)
    if activation == "gelu":
        return functional.gelu(x)
    if activation == "gelu_pytorch_tanh":
        return functional.gelu(x, approximate="tanh")
    raise ValueError(f"unknown activation {activation!r}; known are silu, gelu and gelu_pytorch_tanh")


class ReferenceKernels:
    """``Kernels`` for any device. Activations keep their dtype; norms, softmax and the gate's softmax are fp32."""

    def record(self, call: Callable[[], T]) -> Callable[[], T]:
        """Nothing is written down: ``call`` itself does it again."""
        return call

    def take(self, table: Tensor, ids: Tensor, out: Tensor) -> Tensor:
        return out.copy_(table.index_select(0, ids))

    def add(self, x: Tensor, y: Tensor) -> None:
        x += y.to(x.dtype)

    def linear(self, x: Tensor, weight: Tensor, bias: Tensor | None = None, out: Tensor | None = None) -> Tensor:
        y = functional.linear(x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype))
        return y if out is None else out.copy_(y)

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float, out: Tensor | None = None) -> Tensor:
        wide = x.float()
        y = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
        y = (y.to(x.dtype) * weight.to(x.dtype)).to(x.dtype)
        return y if out is None else out.copy_(y)

    def rope(self, x: Tensor, cos: Tensor, sin: Tensor, positions: Tensor) -> None:
        half = cos.shape[1]
        c, s = (table[positions.long()].unsqueeze(1) for table in (cos, sin))
        first, second = x[..., :half].float(), x[..., half : 2 * half].float()
        x[..., : 2 * half] = torch.cat([first * c - second * s, second * c + first * s], dim=-1).to(x.dtype)

    def store_kv(self, cache: Tensor, rows: Tensor, slots: Tensor) -> None:
        cache.view(-1, *cache.shape[2:])[slots] = rows.to(cache.dtype)

    def attention(
        self,
        q: Tensor,
        k_cache: Tensor,
        v_cache: Tensor,
        tables: Tensor,
        sequence: Tensor,
        positions: Tensor,
        scale: float,
        window: int = 0,
        out: Tensor | None = None,
    ) -> Tensor:
        rows_out = torch.empty_like(q) if out is None else out.view(q.shape)
        for s in sequence.unique().tolist():
            rows = (sequence == s).nonzero().squeeze(1)
            at = positions[rows].long()
            last = int(at.max()) + 1
            blocks = tables[s, : -(-last // k_cache.shape[1])].long()
            k, v = (cache[blocks].flatten(0, 1)[:last] for cache in (k_cache, v_cache))
            rows_out[rows] = _attend(q[rows], k.to(q.dtype), v.to(q.dtype), at, scale, window)
        return rows_out.flatten(1)

    def route(self, x: Tensor, weight: Tensor, router: RouterSpec) -> tuple[Tensor, Tensor]:
        scores = functional.linear(x, weight.to(x.dtype)).float().softmax(-1)
        order = scores.sort(dim=-1, descending=True, stable=True)
        weights, ids = order.values[:, : router.top_k], order.indices[:, : router.top_k]
        if router.normalise:
            weights = weights / weights.sum(-1, keepdim=True)
        return weights.contiguous(), ids.int().contiguous()

    def expert_table(self, experts: Mapping[int, Sequence[Tensor]]) -> ReferenceTable:
        return ReferenceTable(dict(experts))

    def experts(
        self, x: Tensor, table: ExpertTable, tokens: Tensor, ids: Tensor, activation: str, out: Tensor
    ) -> Tensor:
        if not isinstance(table, ReferenceTable):
            raise TypeError("the expert table was made by other kernels")
        for expert in ids.unique().tolist():
            gate, up, down = (weight.to(x.dtype) for weight in table.weights[expert])
            parts = (ids == expert).nonzero().squeeze(1)
            rows = x[tokens[parts].long()]
            hidden = activate(functional.linear(rows, gate), activation) * functional.linear(rows, up)
            out[parts] = functional.linear(hidden, down).to(out.dtype)
        return out

    def combine(self, out: Tensor, rows: Sequence[Tensor], source: Tensor, index: Tensor, weights: Tensor) -> None:
        offsets = torch.tensor([0, *(len(part) for part in rows)], device=out.device).cumsum(0)
        parts = torch.cat([part.float() for part in rows])
        total = torch.zeros(out.shape, dtype=torch.float32, device=out.device)
        for j in range(source.shape[1]):
            chosen = parts[offsets[source[:, j].long()] + index[:, j].long()]
            total += weights[:, j, None] * chosen
        out += total.to(out.dtype)


def _attend(q: Tensor, k: Tensor, v: Tensor, positions: Tensor, scale: float, window: int) -> Tensor:
    """One sequence: q [R, heads, D] at ``positions`` over k, v [P, kv_heads, D] -> [R, heads, D]."""
    group = q.shape[1] // k.shape[1]
    k, v = (rows.repeat_interleave(group, dim=1) for rows in (k, v))
    scores = torch.einsum("rhd,phd->hrp", q.float(), k.float()) * scale
    cache = torch.arange(k.shape[0], device=q.device)
    hidden = cache > positions[:, None]
    if window:
        hidden |= cache <= positions[:, None] - window
    weights = scores.masked_fill(hidden, float("-inf")).softmax(-1)
    return torch.einsum("hrp,phd->rhd", weights, v.float()).to(q.dtype)
