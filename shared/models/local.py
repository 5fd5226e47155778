"""A whole model in one process: its decoder, and all experts without any exchange. The yardstick of the mesh."""

from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from shared.activation import own_parts, sum_order
from shared.kernels.base import Kernels
from shared.models.decoder import Decoder, KvCache, StepInput
from shared.models.loader import Checkpoint
from shared.models.moe import MoeLayer, compute_parts, weights_of_sum
from shared.models.scratch import Scratch

Watch = Callable[[int, Tensor, NDArray[np.int32]], None]
"""Sees what the gate of a layer with experts reads [T, H] and chooses [T, k]; both are valid until it returns."""


class LocalExperts:
    """Every routed expert of every layer. One thread at a time."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        kernels: Kernels,
        device: torch.device,
        dtype: torch.dtype,
        watch: Watch | None = None,
    ) -> None:
        """Raises ModelError. ``dtype`` as in ``MoeLayer``."""
        spec = checkpoint.spec
        self._kernels, self._watch = kernels, watch
        self._layers = {layer: MoeLayer(checkpoint, kernels, device, dtype, layer) for layer in spec.moe_layers}
        for layer in self._layers.values():
            layer.load(range(spec.router.experts))
        self._scratch = Scratch(device)

    def add(self, layer: int, rows: Tensor, x: Tensor) -> None:
        """x [T, H] += weighted experts of rows [T, H], in ascending expert order: the bits that an exchange gives."""
        moe = self._layers[layer]
        weights, ids = (tensor.numpy(force=True) for tensor in moe.gate(rows))
        if self._watch:
            self._watch(layer, rows, ids)
        parts = own_parts(ids, np.zeros_like(ids), weights, 0)
        out = self._scratch.rows("parts", len(parts.tokens), rows.shape[1], torch.float32)
        compute_parts(moe, rows, parts, out)
        index = sum_order(parts, ids.shape)
        arrays = np.zeros_like(index), index, weights_of_sum(moe, parts)[index]
        self._kernels.combine(x, [out], *(torch.from_numpy(array).to(x.device) for array in arrays))


class LocalModel:
    """The decoder and ``LocalExperts``, step by step."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        kernels: Kernels,
        device: torch.device,
        dtype: torch.dtype,
        max_positions: int,
        watch: Watch | None = None,
    ) -> None:
        self.decoder = Decoder(checkpoint, kernels, device, dtype, max_positions)
        self.experts = LocalExperts(checkpoint, kernels, device, dtype, watch)

    def forward(self, step: StepInput, cache: KvCache) -> Tensor:
        """One step -> logits fp32 [R, vocab]."""
        x = self.decoder.embed(step, self.decoder.new_rows(len(step.tokens)))
        rows = torch.empty_like(x)
        for layer in self.decoder.spec.layers:
            self.decoder.attend(layer.index, x, step, cache, out=rows)
            if layer.moe:
                self.decoder.shared(layer.index, rows, x)
                self.experts.add(layer.index, rows, x)
            else:
                self.decoder.dense(layer.index, rows, x)
        return self.decoder.logits(x, step).clone()
