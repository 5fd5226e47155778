"""``Kernels`` on CUDA: plain torch, experts in grouped products, and calls recorded as CUDA graphs.

What ``reference`` does without a look at values on the host is inherited. No graph has been captured and no grouped
kernel of a GPU has run yet: tests on CPU tensors cover the arithmetic, tests/gpu the rest where there is a GPU.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import cached_property

import torch
from torch import Tensor

from shared.kernels import cuda_attention
from shared.kernels.base import ExpertTable, Paged, T, Visibility
from shared.kernels.cuda_experts import StackedTable, grouped_feed_forward, stacked
from shared.kernels.cuda_graphs import Capturing, GraphRecording, Graphs
from shared.kernels.reference import ReferenceKernels, ReferenceTable, feed_forward
from shared.kernels.weights import Weight


class CudaKernels(ReferenceKernels):
    """One thread at a time. All but ``record`` works on tensors of any device.

    Args:
        device: where calls are recorded.
        graphs: what captures them; CUDA graphs by default.
    """

    def __init__(self, device: torch.device, graphs: Capturing | None = None) -> None:
        self._device = device
        self._given = graphs
        self._host_reads = 0
        """How often a kernel has looked at values on the host, which no graph can."""

    @cached_property
    def _graphs(self) -> Capturing:
        return self._given or Graphs(self._device)

    def record(self, call: Callable[[], T]) -> Callable[[], T]:
        """See ``GraphRecording``: decode steps, steps of one sequence and gates become graphs, mixed steps do not."""
        return GraphRecording(call, self._graphs, lambda: self._host_reads)

    def attention(self, q: Tensor, caches: tuple[Tensor, Tensor], at: Paged, sees: Visibility, out: Tensor) -> Tensor:
        if len(q) == 0:
            return out
        mixed = out.view(len(q), q.shape[1], caches[1].shape[3])
        if cuda_attention.by_shape(at):
            mixed.copy_(cuda_attention.mix(q, caches, at, sees))
            return out
        self._host_reads += 1
        for rows, part in cuda_attention.groups(at):
            mixed[rows] = cuda_attention.mix(q[rows], caches, part, sees).to(mixed.dtype)
        return out

    def expert_table(self, experts: Mapping[int, Sequence[Weight]], beside: ExpertTable | None = None) -> ExpertTable:
        """One expert stays where it is (dense and shared feed-forwards); several are copied into stacks.

        Raises ValueError when their weights differ in shape or dtype.
        """
        if isinstance(beside, ReferenceTable):
            experts, beside = {**beside.weights, **experts}, None
        if beside is None and len(experts) < 2:
            return ReferenceTable(dict(experts))
        if not isinstance(beside, StackedTable | None):
            raise TypeError("the expert table was made by other kernels")
        return stacked(experts, beside) if experts or beside is None else beside

    def experts(
        self, x: Tensor, table: ExpertTable, tokens: Tensor, ids: Tensor, activation: str, out: Tensor
    ) -> Tensor:
        """Raises TypeError when the stacked weights have another dtype than ``x``."""
        if len(ids) == 0:
            return out
        if isinstance(table, ReferenceTable) and len(table.weights) == 1:
            (weights,) = table.weights.values()
            return out.copy_(feed_forward(x.index_select(0, tokens), weights, activation))
        if not isinstance(table, StackedTable):
            raise TypeError("the expert table was made by other kernels")
        self._host_reads += 1  # grouped_mm does, where it has no kernel for the device and dtype
        return grouped_feed_forward(x, table, tokens, ids, activation, out)
