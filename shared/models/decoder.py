"""Everything of a model but its routed experts: embedding, attention, norms, dense and shared feed-forwards, head.

Works on flattened rows of many sequences over a paged KV cache; knows no requests and no services. T = rows of a step,
H = hidden size, R = rows whose logits are wanted.
"""

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from shared.kernels.base import ExpertTable, Kernels, Paged
from shared.models.attention import Attention, GroupedAttention, LatentAttention, temperature_table
from shared.models.layout import decoder_roles, outer_roles
from shared.models.loader import Checkpoint, LayerWeights
from shared.models.rope import rope_tables
from shared.models.scratch import Scratch
from shared.models.spec import LayerSpec


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

    @property
    def at(self) -> Paged:
        return Paged(self.tables, self.sequence, self.positions)


@dataclass
class KvCache:
    """Per layer [blocks, block_size, kv_heads, width]; in latent attention values are a view of the keys."""

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
        self.scratch = Scratch(device)
        self.outer = {role: checkpoint.load(role, 0, 0, device, dtype) for role in outer_roles(spec)}
        self.layers = [
            checkpoint.layer(decoder_roles(spec, layer), layer.index, device, dtype) for layer in spec.layers
        ]
        ropes = {layer.attention.rope for layer in spec.layers} - {None}
        self.rope = {rope: rope_tables(rope, max_positions, device) for rope in ropes if rope is not None}
        self.attention = [
            self._attention(layer, w, max_positions) for layer, w in zip(spec.layers, self.layers, strict=True)
        ]
        self.feed_forwards = [self._feed_forward(w) for w in self.layers]

    def new_cache(self, blocks: int, block_size: int) -> KvCache:
        """Zeroed, because a masked row of garbage may hold NaN, which no mask multiplies away."""

        def make(heads: int, width: int) -> Tensor:
            return _zeros((blocks, block_size, heads, width), self.dtype, self.device)

        k, v = zip(*(attention.new_cache(make) for attention in self.attention), strict=True)
        return KvCache(list(k), list(v))

    def bytes_per_block(self, block_size: int) -> int:
        """Bytes of the cache over all layers for ``block_size`` tokens."""
        return block_size * sum(attention.width() for attention in self.attention) * self.dtype.itemsize

    def new_rows(self, count: int) -> Tensor:
        """Room for a residual stream [count, H]."""
        dtype = torch.float32 if self.device.type == "cpu" else self.dtype
        return torch.empty(count, self.spec.hidden, dtype=dtype, device=self.device)

    def embed(self, step: StepInput, out: Tensor) -> Tensor:
        """out [T, H] = the residual stream before the first layer."""
        self.kernels.take(self.outer["embed"], step.tokens, out)
        if self.spec.embed_scale != 1.0:
            self.kernels.scale(out, self.spec.embed_scale)
        return out

    def attend(self, layer: int, x: Tensor, step: StepInput, cache: KvCache, out: Tensor) -> None:
        """x [T, H] += attention of ``layer``; out [T, H] = the post-attention norm of x, what experts read."""
        w = self.layers[layer].vectors
        normed = self.scratch.rows("normed", len(x), self.spec.hidden, x.dtype)
        self._norm(x, w, "input_norm", normed)
        attended = self.attention[layer].run(normed, step.at, step.slots, (cache.k[layer], cache.v[layer]))
        self.kernels.add(x, attended, self.spec.residual_scale)
        self._norm(x, w, "post_norm", out)

    def dense(self, layer: int, rows: Tensor, x: Tensor) -> None:
        """x [T, H] += the feed-forward of a layer without experts, applied to ``rows`` (out of ``attend``)."""
        self.kernels.add(x, self._fed(layer, rows), self.spec.residual_scale)

    def shared(self, layer: int, rows: Tensor, x: Tensor) -> None:
        """x [T, H] += the shared experts of a layer with experts, if it has any, applied to ``rows``.

        Needs nothing of the routed experts, so it may run while they compute; before their parts are added.
        """
        if not self.spec.shared_hidden:
            return
        parts = self._fed(layer, rows)
        if self.spec.shared_gate:
            gate = self.scratch.rows("gate", len(rows), 1, rows.dtype)
            self.kernels.linear(rows, self.layers[layer].matrices["shared_router"], out=gate)
            self.kernels.gated_add(x, parts, gate)
        else:
            self.kernels.add(x, parts, self.spec.residual_scale)

    def logits(self, x: Tensor, step: StepInput) -> Tensor:
        """fp32 [R, vocab], valid until the next call."""
        rows = self.scratch.rows("chosen", len(step.logit_rows), self.spec.hidden, x.dtype)
        self.kernels.take(x, step.logit_rows, rows)
        self._norm(rows, self.outer, "norm", rows)
        if self.spec.logit_scale != 1.0:
            self.kernels.scale(rows, self.spec.logit_scale)
        head = self.outer["embed" if self.spec.tied_head else "head"]
        out = self.scratch.rows("logits", len(rows), head.shape[0], torch.float32)
        return self.kernels.linear(rows, head, self.outer.get("head_bias"), out)

    def _norm(self, x: Tensor, weights: dict[str, Tensor], role: str, out: Tensor) -> None:
        if self.spec.layer_norm:
            self.kernels.layer_norm(x, weights[role], weights[f"{role}_bias"], self.spec.norm_eps, out=out)
        else:
            self.kernels.rms_norm(x, weights[role], self.spec.norm_eps, out=out)

    def _fed(self, layer: int, rows: Tensor) -> Tensor:
        """A gated feed-forward [T, H]: a single expert that every row chooses, for the experts' order of operations."""
        table = self.feed_forwards[layer]
        assert table is not None  # layers have one or the other
        parts = self.scratch.rows("parts", len(rows), self.spec.hidden, torch.float32)
        return self.kernels.experts(rows, table, *self.scratch.everyone(len(rows)), self.spec.activation, parts)

    def _attention(self, layer: LayerSpec, w: LayerWeights, max_positions: int) -> Attention:
        a = layer.attention
        rotation = None if a.rope is None else self.rope[a.rope]
        if a.latent is not None:
            assert rotation is not None  # latent attention always has positions
            return LatentAttention(a, a.latent, w, self.kernels, self.scratch, self.spec.norm_eps, rotation)
        warmth = None if a.temperature is None else temperature_table(a.temperature, max_positions, self.device)
        return GroupedAttention(a, w, self.kernels, self.scratch, self.spec.norm_eps, rotation, warmth)

    def _feed_forward(self, w: LayerWeights) -> ExpertTable | None:
        """What every row of a layer goes through on this side: dense or shared."""
        for prefix in ("dense", "shared"):
            if f"{prefix}_gate" in w.matrices:
                parts = [w.matrices[f"{prefix}_{part}"] for part in ("gate", "up", "down")]
                return self.kernels.expert_table({0: parts})
        return None


def _zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Zeros; on the CPU pages that nobody has written take no memory, as torch.zeros would."""
    if device.type != "cpu":
        return torch.zeros(shape, dtype=dtype, device=device)
    return torch.from_numpy(np.zeros(math.prod(shape) * dtype.itemsize, np.uint8)).view(dtype).view(shape)
