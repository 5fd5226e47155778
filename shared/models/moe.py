"""The routed experts of one layer: its gate, and whichever experts are resident here. Knows no homes and no slots."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from shared.activation import Parts
from shared.errors import ModelError
from shared.kernels.base import Answering, ExpertTable, Kernels
from shared.kernels.weights import Weight
from shared.models.layout import expert_roles, router_roles
from shared.models.loader import Checkpoint
from shared.models.scratch import Scratch

RECORDED_ROWS = 64
"""The gate's kernels are recorded for up to so many rows: beyond, the interpreter does not count."""


class ExpertLayer(Protocol):
    """What computing parts asks of ``MoeLayer``."""

    @property
    def weighs_input(self) -> bool: ...

    def gate(self, rows: Tensor) -> tuple[Tensor, Tensor]: ...

    def forward(self, rows: Tensor, tokens: Tensor, ids: Tensor, weights: Tensor, out: Tensor) -> None: ...

    def answering(self, rows: Tensor) -> Answering | None: ...


def expert_weights(
    checkpoint: Checkpoint, layer: int, expert: int, device: torch.device, dtype: torch.dtype
) -> tuple[Weight, ...]:
    """Weights of a routed expert in the order of ``expert_roles``, views where the file allows. Raises ModelError."""
    roles = expert_roles(checkpoint.spec)
    return tuple(checkpoint.weight(role, layer, expert, device, dtype) for role in roles)


def compute_parts(layer: ExpertLayer, rows: Tensor, parts: Parts, out: Tensor) -> None:
    """out fp32 [P, H] = the parts' experts applied to their rows of rows [T, H], not weighted."""
    if len(parts.tokens):
        tokens, experts, weights = (torch.from_numpy(array).to(rows.device) for array in parts)
        layer.forward(rows, tokens, experts, weights, out)


def weights_of_sum(layer: ExpertLayer, parts: Parts) -> NDArray[np.float32]:
    """fp32 [P]: factors of the parts when they are summed."""
    return np.ones_like(parts.weights) if layer.weighs_input else parts.weights


class MoeLayer:
    """One layer with experts. ``forward`` may run while another thread is in ``load``: tables are swapped whole."""

    def __init__(
        self, checkpoint: Checkpoint, kernels: Kernels, device: torch.device, dtype: torch.dtype, layer: int
    ) -> None:
        """Loads the gate and no experts. ``dtype`` is that of weights off CPU; on CPU they stay as in the file."""
        self.spec, self.layer = checkpoint.spec, layer
        self._checkpoint, self._kernels, self._device, self._dtype = checkpoint, kernels, device, dtype
        self._gate = {role: checkpoint.load(role, layer, 0, device, dtype) for role in router_roles(checkpoint.spec)}
        self._scratch = Scratch(device)
        self._recorded: dict[tuple[int, torch.dtype], tuple[Tensor, Callable[[], tuple[Tensor, Tensor]]]] = {}
        """By number and dtype of rows: where they go, and how they are routed."""
        self._answering: dict[int, tuple[ExpertTable, Answering | None]] = {}
        """By number of rows; of the table that was there then."""
        self._table: ExpertTable | None = None
        self._weighed: tuple[ExpertTable | None, int] = (None, 0)
        """A table and its bytes."""

    @property
    def resident(self) -> frozenset[int]:
        return self._table.resident if self._table else frozenset()

    @property
    def nbytes(self) -> int:
        """Bytes of the resident experts' weights; on CPU most are mapped."""
        table, (known, size) = self._table, self._weighed
        if table is not known:
            self._weighed = table, size = table, table.nbytes if table else 0
        return size

    def load(self, experts: Iterable[int]) -> None:
        """Make these experts resident, beside those that are already. Raises ModelError for an unknown id."""
        new = sorted(set(experts) - self.resident)
        if new:
            self.hold({e: expert_weights(self._checkpoint, self.layer, e, self._device, self._dtype) for e in new})

    def hold(self, weights: Mapping[int, Sequence[Weight]]) -> None:
        """Make experts resident whose weights are there already, in the order of ``expert_roles``."""
        self._swap(self._kernels.expert_table(weights, self._table))

    def unload(self, experts: Iterable[int]) -> None:
        """Let go of these experts; those that are not resident are ignored."""
        if self._table:
            self._swap(self._table.without(frozenset(experts)))

    def gate(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """rows [T, H] -> (weights fp32 [T, k], ids int32 [T, k]), valid until the next call."""
        if len(rows) > RECORDED_ROWS:
            return self._route(rows)
        key = len(rows), rows.dtype
        if key not in self._recorded:
            room = self._scratch.rows("gated", len(rows), self.spec.hidden, rows.dtype)
            self._recorded[key] = room, self._kernels.record(partial(self._route, room))
        room, route = self._recorded[key]
        room.copy_(rows)
        return route()

    def _route(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        bias, correction = self._gate.get("router_bias"), self._gate.get("router_correction")
        return self._kernels.route(rows, self._gate["router"], self.spec.router, bias, correction)

    def answering(self, rows: Tensor) -> Answering | None:
        """One call for the gate and the resident experts of so many rows, where the kernels have one."""
        table, count = self._table, len(rows)
        if table is None or self.weighs_input or rows.dtype is not torch.float32 or not 0 < count <= RECORDED_ROWS:
            return None
        known, answering = self._answering.get(count, (None, None))
        if known is not table:
            room = self._scratch.rows("gated", count, self.spec.hidden, rows.dtype)
            answering = self._kernels.answering(partial(self._route, room), room, table, self.spec.activation)
            self._answering[count] = table, answering
        return answering

    @property
    def weighs_input(self) -> bool:
        """True: weights belong to ``forward`` and the sum of parts has none (Llama-4)."""
        return self.spec.router.weighs_input

    def forward(self, rows: Tensor, tokens: Tensor, ids: Tensor, weights: Tensor, out: Tensor) -> None:
        """out fp32 [P, H] = expert ids[p] of row tokens[p] of rows [T, H]; int32, ``ids`` ascending and resident.

        weights fp32 [P] multiply the rows if ``weighs_input``, else they are not looked at.
        """
        table = self._table
        if table is None:
            raise ModelError(f"layer {self.layer}", "no expert is resident")
        if self.weighs_input:
            taken = self._scratch.rows("weighted", len(tokens), rows.shape[1], rows.dtype)
            numbers = self._scratch.everyone(len(tokens))[0]
            self._kernels.take(rows, tokens.long(), taken)
            self._kernels.scale_rows(taken, weights, numbers)
            rows, tokens = taken, numbers
        self._kernels.experts(rows, table, tokens, ids, self.spec.activation, out)

    def _swap(self, table: ExpertTable) -> None:
        self._table = table if table.resident else None
        self._answering = {}
