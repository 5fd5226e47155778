"""Routed experts of one layer on a GPU: weights stacked by slot, all parts of an exchange in two grouped products.

The products are torch's ``grouped_mm``: one kernel for bf16 on Hopper and its successor (compute capability 9 and 10),
else a loop over the slots inside torch, which reads the offsets on the host. On CPU it is that loop, which is how tests
compare with ``reference``.

Memory: one layer's stacks have as many slots as it had experts at most; slots of experts that left are used again. When
they do not suffice, stacks of the new size are made and the old ones copied: both are there for that moment.
"""

from collections.abc import Mapping, Sequence
from copy import copy
from dataclasses import dataclass, replace
from typing import Protocol, Self

import torch
from torch import Tensor
from torch.nn import functional

from shared.kernels.reference import activate
from shared.kernels.weights import Fp8Blocks, Weight, unpack

ALIGNED = 8
"""Numbers of 2 bytes or more: rows of matrices begin at multiples of 16 bytes, as ``grouped_mm`` wants it."""
TOGETHER = ((0, 1), (2,), (3, 4), (5,))
"""Which of an expert's weights share a stack: gate and up, down; then their biases."""
UNPACKED_AT_ONCE = 8
"""FP8 experts whose fp32 form exists at a time."""


class Stack(Protocol):
    """Matrices of every slot; those of one slot lie one below the other."""

    @property
    def slots(self) -> int: ...

    @property
    def nbytes(self) -> int: ...

    def grown(self, slots: int) -> Self:
        """A copy with so many slots; whoever computes with this one may go on."""
        ...

    def put(self, slot: int, weights: Sequence[Weight]) -> None:
        """Raises ValueError for shapes or a dtype that differ from the stack's."""
        ...

    def groups(self, slots: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """For rows that go to ``slots`` (int64 [P], ascending): matrices [G, N, K], and where groups end: int32 [G]."""
        ...


class PlainStack:
    """Matrices as they are, padded with zeros to multiples of ALIGNED."""

    def __init__(self, weights: Sequence[Tensor], slots: int) -> None:
        self._shapes, first = [weight.shape for weight in weights], weights[0]
        rows, width = sum(_aligned(len(weight)) for weight in weights), _aligned(first.shape[1])
        self.data = first.new_zeros(slots, rows, width)

    @property
    def slots(self) -> int:
        return len(self.data)

    @property
    def nbytes(self) -> int:
        return self.data.nbytes

    def grown(self, slots: int) -> Self:
        grown = copy(self)
        grown.data = _longer(self.data, slots)
        return grown

    def put(self, slot: int, weights: Sequence[Weight]) -> None:
        row = 0
        for shape, weight in zip(self._shapes, weights, strict=True):
            if not isinstance(weight, Tensor) or weight.shape != shape or weight.dtype != self.data.dtype:
                raise ValueError(f"an expert's weights differ from {tuple(shape)} of {self.data.dtype}, as others have")
            self.data[slot, row : row + shape[0], : shape[1]] = weight
            row += _aligned(shape[0])

    def groups(self, slots: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        if dtype != self.data.dtype:
            raise TypeError(f"rows are {dtype}, the experts' weights {self.data.dtype}")
        return self.data, _ends(slots, self.slots)


class Fp8Stack:
    """FP8 values and factors; of each exchange only the experts that are used in it are unpacked, into its dtype."""

    def __init__(self, weights: Sequence[Fp8Blocks], slots: int) -> None:
        self._forms = [(weight.shape, weight.block) for weight in weights]
        bytes_ = (weight.values.view(torch.uint8) for weight in weights)  # what can be indexed, unlike FP8
        self._values = [_room(values, slots) for values in bytes_]
        self._factors = [_room(weight.factors, slots) for weight in weights]

    @property
    def slots(self) -> int:
        return len(self._values[0])

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in (*self._values, *self._factors))

    def grown(self, slots: int) -> Self:
        grown = copy(self)
        grown._values = [_longer(values, slots) for values in self._values]
        grown._factors = [_longer(factors, slots) for factors in self._factors]
        return grown

    def put(self, slot: int, weights: Sequence[Weight]) -> None:
        for i, (weight, form) in enumerate(zip(weights, self._forms, strict=True)):
            if not isinstance(weight, Fp8Blocks) or (weight.shape, weight.block) != form:
                raise ValueError(f"an expert's weights differ from FP8 {tuple(form[0])}, as others have")
            self._values[i][slot], self._factors[i][slot] = weight.values.view(torch.uint8), weight.factors

    def groups(self, slots: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """As many groups as slots may be used; those behind the last one that is used have no rows."""
        count = min(self.slots, len(slots))
        group = functional.pad((slots[1:] != slots[:-1]).cumsum(0), (1, 0))
        used = slots.new_zeros(count).index_copy_(0, group, slots)
        return torch.cat([self._unpacked(some, dtype) for some in used.split(UNPACKED_AT_ONCE)]), _ends(group, count)

    def _unpacked(self, slots: Tensor, dtype: torch.dtype) -> Tensor:
        """[len(slots), N, K], padded as in ``PlainStack``."""
        parts = []
        for values, factors, ((rows, width), block) in zip(self._values, self._factors, self._forms, strict=True):
            wide = unpack(values[slots].view(torch.float8_e4m3fn), factors[slots], block)
            parts.append(functional.pad(wide.to(dtype), (0, _aligned(width) - width, 0, _aligned(rows) - rows)))
        return torch.cat(parts, 1)


@dataclass(frozen=True, eq=False)
class StackedTable:
    """Resident experts and their slots. A table and those made of it share stacks; each reads its own slots only."""

    slots: Mapping[int, int]
    """Of logical experts."""
    where: Tensor
    """The same: int64 [highest id + 1] on the device, undefined where nothing is resident."""
    stacks: tuple[Stack, ...]
    """As TOGETHER says; two or four."""
    hidden: int

    @property
    def resident(self) -> frozenset[int]:
        return frozenset(self.slots)

    @property
    def nbytes(self) -> int:
        """Free slots included."""
        return sum(stack.nbytes for stack in self.stacks)

    def without(self, experts: frozenset[int]) -> "StackedTable":
        """See ``ExpertTable``."""
        return replace(self, slots={e: slot for e, slot in self.slots.items() if e not in experts})


def stacked(experts: Mapping[int, Sequence[Weight]], beside: StackedTable | None) -> StackedTable:
    """``experts``, at least one, in slots that those of ``beside`` leave free. Raises ValueError for unlike weights."""
    held = beside.slots if beside else {}
    first = next(iter(experts.values()))
    stacks = beside.stacks if beside else _new_stacks(first, len(experts))
    most = max(stacks[0].slots, len(held) + len(experts))
    if most > stacks[0].slots:
        stacks = tuple(stack.grown(most) for stack in stacks)
    free = (slot for slot in range(most) if slot not in set(held.values()))
    slots = dict(held) | dict(zip(experts, free, strict=False))
    for expert, weights in experts.items():
        for stack, which in zip(stacks, TOGETHER[: len(weights) // 3 * 2], strict=True):
            stack.put(slots[expert], [_matrix(weights[i]) for i in which])
    where = [slots.get(expert, 0) for expert in range(max(slots) + 1)]
    return StackedTable(slots, torch.tensor(where, device=first[0].device), stacks, first[2].shape[0])


def grouped_feed_forward(
    x: Tensor, table: StackedTable, tokens: Tensor, ids: Tensor, activation: str, out: Tensor
) -> Tensor:
    """See ``Kernels.experts``; at least one part. An id that is not resident is not noticed: its part is wrong."""
    up, down, *biases = table.stacks
    b_up, b_down = biases or (None, None)
    slots, order = table.where[ids.long()].sort(stable=True)
    rows = x[tokens[order].long()]
    rows = functional.pad(rows, (0, _aligned(rows.shape[1]) - rows.shape[1]))
    gate, ups = _product(rows, up, b_up, slots).chunk(2, -1)
    out[order] = _product(activate(gate, ups, activation), down, b_down, slots)[:, : table.hidden].to(out.dtype)
    return out


def _product(rows: Tensor, stack: Stack, biases: Stack | None, slots: Tensor) -> Tensor:
    """Row p times the matrices of slots[p]; ``slots`` ascending."""
    matrices, ends = stack.groups(slots, rows.dtype)
    product = functional.grouped_mm(rows, matrices.transpose(1, 2), offs=ends)
    return product + biases.groups(slots, rows.dtype)[0][..., 0][slots] if biases else product


def _new_stacks(weights: Sequence[Weight], slots: int) -> tuple[Stack, ...]:
    """For experts like this one."""

    def make(parts: list[Weight]) -> Stack:
        blocks = [part for part in parts if isinstance(part, Fp8Blocks)]
        plain = [part for part in parts if isinstance(part, Tensor)]
        return PlainStack(plain, slots) if len(plain) == len(parts) else Fp8Stack(blocks, slots)

    return tuple(make([_matrix(weights[i]) for i in which]) for which in TOGETHER[: len(weights) // 3 * 2])


def _matrix(weight: Weight) -> Weight:
    """A bias is a matrix of one column."""
    return weight[:, None] if isinstance(weight, Tensor) and weight.dim() == 1 else weight


def _aligned(size: int) -> int:
    return -(-size // ALIGNED) * ALIGNED


def _room(like: Tensor, slots: int) -> Tensor:
    return like.new_zeros((slots, *like.shape))


def _longer(tensor: Tensor, slots: int) -> Tensor:
    """``tensor`` and zeros behind it."""
    longer = _room(tensor[0], slots)
    longer[: len(tensor)] = tensor
    return longer


def _ends(groups: Tensor, count: int) -> Tensor:
    """int32 [count]: where the rows of every group end; ``groups`` int64 [P], ascending."""
    return torch.searchsorted(groups, torch.arange(count, device=groups.device), right=True, out_int32=True)
