"""Random inputs for the kernel tests: weights, a paged cache with shuffled blocks, parts of experts."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from shared.kernels.base import Kernels

WEIGHT_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def normal(*shape: int, seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=generator(seed)).to(dtype)


@dataclass(frozen=True)
class PagedCase:
    """Query rows of some sequences over a paged cache; ``kv`` holds each sequence's keys and values in order."""

    q: Tensor
    kv: tuple[Tensor, Tensor]
    tables: Tensor
    sequence: Tensor
    positions: Tensor
    caches: tuple[Tensor, Tensor]
    window: int = 0

    def run(self, kernels: Kernels) -> Tensor:
        scale = self.q.shape[-1] ** -0.5
        rows = (self.tables, self.sequence, self.positions)
        return kernels.attention(self.q, *self.caches, *rows, scale, self.window)

    def rows(self, chosen: list[int]) -> "PagedCase":
        """The same cache, but only these query rows."""
        at = torch.tensor(chosen)
        parts = (self.q[at], self.sequence[at], self.positions[at])
        return replace(self, q=parts[0], sequence=parts[1], positions=parts[2])

    def laid_out(self, block_size: int, seed: int) -> "PagedCase":
        """The same sequences in blocks of another size, shuffled; what no sequence uses is NaN."""
        sequences, length, kv_heads, depth = self.kv[0].shape
        per = -(-length // block_size)
        blocks = sequences * per + 3
        order = torch.randperm(blocks, generator=generator(seed))[: sequences * per]
        tables = order.view(sequences, per)
        caches = []
        for rows in self.kv:
            cache = torch.full((blocks, block_size, kv_heads, depth), float("nan"))
            padded = torch.full((sequences, per * block_size, kv_heads, depth), float("nan"))
            padded[:, :length] = rows
            cache[order] = padded.view(-1, block_size, kv_heads, depth)
            caches.append(cache)
        return replace(self, tables=tables.int(), caches=(caches[0], caches[1]))


def paged_case(
    lengths: list[int],
    heads: int = 4,
    kv_heads: int = 2,
    depth: int = 32,
    block_size: int = 16,
    window: int = 0,
    seed: int = 0,
) -> PagedCase:
    """Every position of every sequence is a query row, sequence after sequence."""
    shape = (len(lengths), max(lengths), kv_heads, depth)
    kv = (normal(*shape, seed=seed), normal(*shape, seed=seed + 1))
    sequence = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    positions = torch.cat([torch.arange(length) for length in lengths])
    q = normal(len(sequence), heads, depth, seed=seed + 2)
    nothing = torch.empty(0, dtype=torch.int32)
    case = PagedCase(q, kv, nothing, sequence.int(), positions.int(), kv, window)
    return case.laid_out(block_size, seed)


@dataclass(frozen=True)
class ExpertCase:
    x: Tensor
    experts: dict[int, tuple[Tensor, Tensor, Tensor]]
    tokens: Tensor
    ids: Tensor
    activation: str = "silu"

    def run(self, kernels: Kernels) -> Tensor:
        out = torch.full((len(self.ids), self.x.shape[1]), float("nan"))
        return kernels.experts(self.x, kernels.expert_table(self.experts), self.tokens, self.ids, self.activation, out)

    def parts(self, chosen: list[int]) -> "ExpertCase":
        """Only these parts, on a copy of x that holds nothing but their rows."""
        at = torch.tensor(chosen)
        tokens, inverse = self.tokens[at].unique(return_inverse=True)
        return replace(self, x=self.x[tokens.long()], tokens=inverse.int(), ids=self.ids[at])


def expert_case(
    rows: int,
    hidden: int = 64,
    inner: int = 48,
    experts: int = 7,
    top_k: int = 3,
    dtype: torch.dtype = torch.bfloat16,
    activation: str = "silu",
    seed: int = 0,
) -> ExpertCase:
    """Every row chooses top_k experts; ids are ascending. Logical ids have gaps: 0, 2, 4, ..."""
    shapes = ((inner, hidden), (inner, hidden), (hidden, inner))
    weights = {
        2 * e: tuple(normal(*shape, seed=seed + 10 * e + i, dtype=dtype) * 0.1 for i, shape in enumerate(shapes))
        for e in range(experts)
    }
    chosen = torch.rand(rows, experts, generator=generator(seed)).argsort(1)[:, :top_k]
    order = chosen.flatten().sort(stable=True)
    tokens = (order.indices // top_k).int()
    x = normal(rows, hidden, seed=seed + 1)
    return ExpertCase(x, weights, tokens, (order.values * 2).int(), activation)  # type: ignore[arg-type]
