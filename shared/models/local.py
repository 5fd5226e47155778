"""A whole model in one process: the decoder and all experts, without any exchange. The yardstick of the mesh."""

import torch
from torch import Tensor

from shared.kernels.base import Kernels
from shared.models.decoder import Decoder, KvCache, StepInput
from shared.models.loader import Checkpoint
from shared.models.moe import MoeLayer


class LocalModel:
    """Holds every expert of every layer."""

    def __init__(
        self, checkpoint: Checkpoint, kernels: Kernels, device: torch.device, dtype: torch.dtype, max_positions: int
    ) -> None:
        self.kernels = kernels
        self.decoder = Decoder(checkpoint, kernels, device, dtype, max_positions)
        layers = checkpoint.spec.moe_layers
        self.moe = {layer: MoeLayer(checkpoint, kernels, device, dtype, layer) for layer in layers}
        for layer in self.moe.values():
            layer.load(range(checkpoint.spec.router.experts))

    def forward(self, step: StepInput, cache: KvCache) -> Tensor:
        """One step -> logits fp32 [R, vocab]."""
        x = self.decoder.embed(step, self.decoder.new_rows(len(step.tokens)))
        rows = torch.empty_like(x)
        for layer in self.decoder.spec.layers:
            self.decoder.attend(layer.index, x, step, cache, out=rows)
            if layer.moe:
                self.decoder.shared(layer.index, rows, x)
                self._experts(self.moe[layer.index], rows, x)
            else:
                self.decoder.dense(layer.index, rows, x)
        return self.decoder.logits(x, step)

    def _experts(self, moe: MoeLayer, rows: Tensor, x: Tensor) -> None:
        """x [T, H] += routed experts of rows [T, H], summed by ascending expert id."""
        weights, ids = moe.gate(rows)
        ids, by_id = ids.sort(dim=1)
        weights = weights.gather(1, by_id)
        by_expert = ids.flatten().argsort(stable=True)
        tokens = (by_expert // ids.shape[1]).int()
        parts = torch.empty(len(tokens), rows.shape[1], dtype=torch.float32, device=rows.device)
        moe.forward(rows, tokens, ids.flatten()[by_expert], weights.flatten()[by_expert], parts)
        index = torch.empty_like(tokens)
        index[by_expert] = torch.arange(len(tokens), dtype=torch.int32, device=rows.device)
        index = index.view_as(ids)
        weights = torch.ones_like(weights) if moe.weighs_input else weights
        self.kernels.combine(x, [parts], torch.zeros_like(index), index, weights)
