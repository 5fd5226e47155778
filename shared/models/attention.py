"""Attention of one layer: grouped-query, and multi-head latent (DeepSeek-V2, arXiv 2405.04434).

Projections, norms, rotation, the cache and the mixing, up to the output projection. T = rows of a step.
"""

from typing import Protocol

import torch
from torch import Tensor

from shared.kernels.base import Kernels, Paged, Visibility
from shared.kernels.weights import unpacked
from shared.models.loader import LayerWeights
from shared.models.scratch import Scratch
from shared.models.spec import AttentionSpec, LatentSpec, Temperature

Rotation = tuple[Tensor, Tensor]
"""(cos, sin) of rope.py"""


class Attention(Protocol):
    """One layer's attention."""

    def new_cache(self, make: "MakeCache") -> tuple[Tensor, Tensor]:
        """Keys and values [blocks, block_size, kv_heads, width]; may share memory."""
        ...

    def width(self) -> int:
        """Numbers per token that the cache holds."""
        ...

    def run(self, normed: Tensor, at: Paged, slots: Tensor, caches: tuple[Tensor, Tensor]) -> Tensor:
        """normed [T, H] -> what is added to the residual stream, [T, H]: scratch, valid until the next call."""
        ...


class MakeCache(Protocol):
    """Zeroed [blocks, block_size, heads, width]."""

    def __call__(self, heads: int, width: int) -> Tensor: ...


def temperature_table(temperature: Temperature, max_positions: int, device: torch.device) -> Tensor:
    """fp32 [max_positions]: what queries are multiplied by."""
    positions = torch.arange(max_positions, dtype=torch.float32)
    steps = torch.floor((positions + 1.0) / temperature.interval)
    return (torch.log1p(steps) * temperature.scale + 1.0).to(device)


class _Layer:
    """What both kinds share."""

    def __init__(
        self, spec: AttentionSpec, weights: LayerWeights, kernels: Kernels, scratch: Scratch, eps: float
    ) -> None:
        self.spec, self.kernels, self.scratch, self.eps = spec, kernels, scratch, eps
        self.vectors, self.matrices = weights.vectors, weights.matrices
        self.sees = Visibility(spec.scale, spec.window, spec.chunk, self.vectors.get("sinks"))

    def _room(self, name: str, rows: Tensor, width: int) -> Tensor:
        return self.scratch.rows(name, len(rows), width, rows.dtype)

    def _project(self, rows: Tensor, role: str) -> Tensor:
        weight = self.matrices[role]
        out = self._room(role, rows, weight.shape[0])
        return self.kernels.linear(rows, weight, self.vectors.get(f"{role}_bias"), out=out)


class GroupedAttention(_Layer):
    """Grouped-query attention."""

    def __init__(
        self, spec: AttentionSpec, weights: LayerWeights, kernels: Kernels, scratch: Scratch, eps: float,
        rotation: Rotation | None, temperatures: Tensor | None,
    ) -> None:  # fmt: skip
        super().__init__(spec, weights, kernels, scratch, eps)
        self.rotation, self.temperatures = rotation, temperatures
        self.ones = torch.ones(spec.head_dim, device=self.matrices["q"].device)

    def new_cache(self, make: MakeCache) -> tuple[Tensor, Tensor]:
        return make(self.spec.kv_heads, self.spec.head_dim), make(self.spec.kv_heads, self.spec.head_dim)

    def width(self) -> int:
        return 2 * self.spec.kv_heads * self.spec.head_dim

    def run(self, normed: Tensor, at: Paged, slots: Tensor, caches: tuple[Tensor, Tensor]) -> Tensor:
        a, kernels = self.spec, self.kernels
        q = self._heads(normed, "q", a.heads, at.positions)
        if self.temperatures is not None:
            kernels.scale_rows(q, self.temperatures, at.positions)
        kernels.store_kv(caches[0], self._heads(normed, "k", a.kv_heads, at.positions), slots)
        v = self._project(normed, "v")
        if a.clip:
            kernels.clip(v, a.clip)
        kernels.store_kv(caches[1], v.view(-1, a.kv_heads, a.head_dim), slots)
        mixed = self._room("mixed", normed, a.heads * a.head_dim)
        return self._project(kernels.attention(q, caches, at, self.sees, out=mixed), "o")

    def _heads(self, normed: Tensor, role: str, heads: int, positions: Tensor) -> Tensor:
        """q or k: projected, normed and rotated, [T, heads, head_dim]."""
        a, kernels, rows = self.spec, self.kernels, self._project(normed, role)
        if a.qk_norm == "projection":
            kernels.rms_norm(rows, self.vectors[f"{role}_norm"], self.eps, out=rows)
        if a.clip:
            kernels.clip(rows, a.clip)
        rows = rows.view(-1, heads, a.head_dim)
        if a.qk_norm == "head":
            kernels.rms_norm(rows, self.vectors[f"{role}_norm"], self.eps, out=rows)
        if a.rope is not None and self.rotation is not None:
            kernels.rope(rows, *self.rotation, positions, a.rope.interleaved)
        if a.qk_norm == "l2":
            kernels.rms_norm(rows, self.ones, self.eps, out=rows)
        return rows


class LatentAttention(_Layer):
    """Multi-head latent attention in its absorbed form: queries meet the latents themselves.

    With keys W_k c and values W_v c of a latent c, q . (W_k c) = (W_k^T q) . c, and a mixture of values is W_v of the
    mixture of latents. So all heads share one cached row, the latent beside the rotated key: grouped-query attention
    with one key-value head, whose values are the leading part of its keys.
    """

    def __init__(
        self, spec: AttentionSpec, latent: LatentSpec, weights: LayerWeights, kernels: Kernels, scratch: Scratch,
        eps: float, rotation: Rotation,
    ) -> None:  # fmt: skip
        super().__init__(spec, weights, kernels, scratch, eps)
        self.latent, self.rotation = latent, rotation
        both = unpacked(self.matrices["kv_b"], self.vectors["kv_norm"].dtype)
        halves = both.view(spec.heads, latent.nope_dim + latent.value_dim, latent.rank)
        self.keys = halves[:, : latent.nope_dim].transpose(1, 2).contiguous()
        self.values = halves[:, latent.nope_dim :]

    def new_cache(self, make: MakeCache) -> tuple[Tensor, Tensor]:
        rows = make(1, self.width())
        return rows, rows[..., : self.latent.rank]

    def width(self) -> int:
        return self.latent.rank + self.latent.rope_dim

    def run(self, normed: Tensor, at: Paged, slots: Tensor, caches: tuple[Tensor, Tensor]) -> Tensor:
        kernels, latent, heads = self.kernels, self.latent, self.spec.heads
        kernels.store_kv(caches[0], self._keys(normed, at.positions), slots)
        mixed = self._room("mixed", normed, heads * latent.rank)
        kernels.attention(self._queries(normed, at.positions), caches, at, self.sees, out=mixed)
        values = self._room("values", normed, heads * latent.value_dim)
        kernels.head_linear(mixed.view(-1, heads, latent.rank), self.values, values.view(-1, heads, latent.value_dim))
        return self._project(values, "o")

    def _keys(self, normed: Tensor, positions: Tensor) -> Tensor:
        """[T, 1, rank + rope_dim]: the normed latent beside the rotated key."""
        rows, rank = self._project(normed, "kv_a"), self.latent.rank
        self.kernels.rms_norm(rows[:, :rank], self.vectors["kv_norm"], self.latent.norm_eps, out=rows[:, :rank])
        rows = rows.view(-1, 1, self.width())
        self._rotate(rows[..., rank:], positions)
        return rows

    def _queries(self, normed: Tensor, positions: Tensor) -> Tensor:
        """[T, heads, rank + rope_dim]"""
        latent, kernels, heads = self.latent, self.kernels, self.spec.heads
        rows, role = normed, "q"
        if latent.query_rank:
            rows, role = self._project(normed, "q_a"), "q_b"
            kernels.rms_norm(rows, self.vectors["q_a_norm"], latent.norm_eps, out=rows)
        q = self._project(rows, role).view(-1, heads, self.spec.head_dim)
        still = self._room("still", normed, heads * latent.nope_dim).view(-1, heads, latent.nope_dim)
        kernels.copy(q[..., : latent.nope_dim], still)
        out = self._room("queries", normed, heads * self.width()).view(-1, heads, self.width())
        kernels.head_linear(still, self.keys, out[..., : latent.rank])
        kernels.copy(q[..., latent.nope_dim :], out[..., latent.rank :])
        self._rotate(out[..., latent.rank :], positions)
        return out

    def _rotate(self, rows: Tensor, positions: Tensor) -> None:
        assert self.spec.rope is not None  # latent attention always has positions
        self.kernels.rope(rows, *self.rotation, positions, self.spec.rope.interleaved)
