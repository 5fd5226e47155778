"""Everything of a model but its routed experts: embedding, attention, norms, dense feed-forwards, head.

Works on flattened rows of many sequences over a paged KV cache; knows no requests and no services. T = rows of a step,
H = hidden size, R = rows whose logits are wanted.
"""

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from shared.kernels.base import Kernels
from shared.models.layout import decoder_roles, outer_roles
from shared.models.loader import Checkpoint
from shared.models.rope import rope_tables
from shared.models.scratch import Scratch
from shared.models.spec import AttentionSpec, LayerSpec, RopeSpec


@dataclass
class StepInput:
    """One step's rows, flattened over sequences; tensors on the device."""

    tokens: Tensor
    """int64 [T]"""
    positions: Tensor
    """int32 [T]"""
    slots: Tensor
    """int64 [T]: where each row's K and V go, block * block_size + offset."""
    sequence: Tensor
    """int32 [T]: row of ``tables``."""
    tables: Tensor
    """int32 [sequences, max blocks]"""
    logit_rows: Tensor
    """int64 [R]"""


@dataclass
class KvCache:
    """One [blocks, block_size, kv_heads, head_dim] tensor per layer."""

    k: list[Tensor]
    v: list[Tensor]


class Decoder:
    """The attention side of a model. Rows of the residual stream are fp32 on CPU and ``dtype`` elsewhere."""

    def __init__(
        self, checkpoint: Checkpoint, kernels: Kernels, device: torch.device, dtype: torch.dtype, max_positions: int
    ) -> None:
        """Loads weights (views of the mapped file on CPU). ``dtype`` is that of the cache, and of weights off CPU."""
        spec = checkpoint.spec
        self.spec, self.kernels, self.device, self.dtype = spec, kernels, device, dtype
        self.outer = {role: checkpoint.load(role, 0, 0, device, dtype) for role in outer_roles(spec)}
        self.layers = [
            {role: checkpoint.load(role, layer.index, 0, device, dtype) for role in decoder_roles(spec, layer)}
            for layer in spec.layers
        ]
        self.dense_tables = {
            layer.index: kernels.expert_table({0: [weights[f"dense_{part}"] for part in ("gate", "up", "down")]})
            for layer, weights in zip(spec.layers, self.layers, strict=True)
            if not layer.moe
        }
        self.scratch = Scratch(device)
        ropes: set[RopeSpec] = {layer.attention.rope for layer in spec.layers}
        self.rope = {rope: rope_tables(rope, max_positions, device) for rope in ropes}

    def new_cache(self, blocks: int, block_size: int) -> KvCache:
        """Zeroed, because a masked row of garbage may hold NaN, which no mask multiplies away."""
        shapes = [(blocks, block_size, *_kv_shape(layer)) for layer in self.spec.layers]
        k, v = ([_zeros(shape, self.dtype, self.device) for shape in shapes] for _ in range(2))
        return KvCache(k, v)

    def bytes_per_block(self, block_size: int) -> int:
        """Bytes of K and V over all layers for ``block_size`` tokens."""
        per_token = sum(heads * dim for heads, dim in map(_kv_shape, self.spec.layers))
        return 2 * block_size * per_token * self.dtype.itemsize

    def new_rows(self, count: int) -> Tensor:
        """Room for a residual stream [count, H]."""
        dtype = torch.float32 if self.device.type == "cpu" else self.dtype
        return torch.empty(count, self.spec.hidden, dtype=dtype, device=self.device)

    def embed(self, step: StepInput, out: Tensor) -> Tensor:
        """out [T, H] = the residual stream before the first layer."""
        return self.kernels.take(self.outer["embed"], step.tokens, out)

    def attend(self, layer: int, x: Tensor, step: StepInput, cache: KvCache, out: Tensor) -> None:
        """x [T, H] += attention of ``layer``; out [T, H] = the post-attention norm of x, what experts read."""
        a, w, kernels = self.spec.layers[layer].attention, self.layers[layer], self.kernels
        normed = self._room("normed", x, self.spec.hidden)
        kernels.rms_norm(x, w["input_norm"], self.spec.norm_eps, out=normed)
        q = self._heads(normed, w, "q", a, a.heads, step.positions)
        kernels.store_kv(cache.k[layer], self._heads(normed, w, "k", a, a.kv_heads, step.positions), step.slots)
        v = self._project(normed, w, "v")
        kernels.store_kv(cache.v[layer], v.view(-1, a.kv_heads, a.head_dim), step.slots)
        mixed = self._room("mixed", x, a.heads * a.head_dim)
        rows = (step.tables, step.sequence, step.positions)
        kernels.attention(q, cache.k[layer], cache.v[layer], *rows, a.scale, a.window, out=mixed)
        kernels.add(x, self._project(mixed, w, "o"))
        kernels.rms_norm(x, w["post_norm"], self.spec.norm_eps, out=out)

    def dense(self, layer: int, rows: Tensor, x: Tensor) -> None:
        """x [T, H] += the feed-forward of a layer without experts, applied to ``rows`` (out of ``attend``).

        Runs as a single expert that every row chooses, so that it has the experts' fixed order of operations.
        """
        tokens = torch.arange(len(rows), dtype=torch.int32, device=self.device)
        parts = self.scratch.rows("parts", len(rows), self.spec.hidden, torch.float32)
        table = self.dense_tables[layer]
        self.kernels.experts(rows, table, tokens, torch.zeros_like(tokens), self.spec.activation, parts)
        self.kernels.add(x, parts)

    def logits(self, x: Tensor, step: StepInput) -> Tensor:
        """fp32 [R, vocab]"""
        rows = self._room("chosen", x, self.spec.hidden, len(step.logit_rows))
        self.kernels.take(x, step.logit_rows, rows)
        self.kernels.rms_norm(rows, self.outer["norm"], self.spec.norm_eps, out=rows)
        return self.kernels.linear(rows, self.outer["embed" if self.spec.tied_head else "head"]).float()

    def _room(self, name: str, x: Tensor, width: int, rows: int | None = None) -> Tensor:
        """Scratch of the residual stream's dtype, one row per row of x unless said otherwise."""
        return self.scratch.rows(name, len(x) if rows is None else rows, width, x.dtype)

    def _project(self, rows: Tensor, w: dict[str, Tensor], role: str) -> Tensor:
        out = self._room(role, rows, w[role].shape[0])
        return self.kernels.linear(rows, w[role], w.get(f"{role}_bias"), out=out)

    def _heads(
        self, normed: Tensor, w: dict[str, Tensor], role: str, a: AttentionSpec, heads: int, positions: Tensor
    ) -> Tensor:
        """q or k: projected, normed per head and rotated, [T, heads, head_dim]."""
        rows = self._project(normed, w, role).view(-1, heads, a.head_dim)
        if a.qk_norm:
            self.kernels.rms_norm(rows, w[f"{role}_norm"], self.spec.norm_eps, out=rows)
        self.kernels.rope(rows, *self.rope[a.rope], positions)
        return rows


def _kv_shape(layer: LayerSpec) -> tuple[int, int]:
    return layer.attention.kv_heads, layer.attention.head_dim


def _zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Zeros; on the CPU pages that nobody has written take no memory, as torch.zeros would."""
    if device.type != "cpu":
        return torch.zeros(shape, dtype=dtype, device=device)
    return torch.from_numpy(np.zeros(math.prod(shape) * dtype.itemsize, np.uint8)).view(dtype).view(shape)
