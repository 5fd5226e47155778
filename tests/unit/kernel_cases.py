"""Random inputs for the kernel tests: weights, a paged cache with shuffled blocks, parts of experts."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from shared.kernels.base import Kernels, Paged, Visibility
from shared.kernels.weights import Fp8Blocks, Weight

WEIGHT_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
MATRIX_DTYPES = (*WEIGHT_DTYPES, torch.float8_e4m3fn)
FP8_BLOCKS = ((128, 128), (24, 16), (16, 24))
"""Of which the first is what checkpoints have and the last no multiple of a vector."""


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def normal(*shape: int, seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=generator(seed)).to(dtype)


def fp8(rows: int, cols: int, block: tuple[int, int], seed: int, size: float = 1.0) -> Fp8Blocks:
    """Weights of about this size, and factors that differ from block to block."""
    blocks = [-(-extent // of) for extent, of in zip((rows, cols), block, strict=True)]
    factors = (torch.rand(blocks, generator=generator(seed)) + 0.5) * 0.01 * size
    return Fp8Blocks((normal(rows, cols, seed=seed) * 100).to(torch.float8_e4m3fn), factors, block)


def matrix(rows: int, cols: int, seed: int, dtype: torch.dtype, size: float = 1.0) -> Weight:
    """A matrix of weights of about this size; FP8 in blocks that follow from the seed."""
    if dtype is torch.float8_e4m3fn:
        return fp8(rows, cols, FP8_BLOCKS[seed % len(FP8_BLOCKS)], seed, size)
    return normal(rows, cols, seed=seed, dtype=dtype) * size


@dataclass(frozen=True)
class PagedCase:
    """Query rows of some sequences over a paged cache; ``kv`` holds each sequence's keys and values in order."""

    q: Tensor
    kv: tuple[Tensor, Tensor]
    tables: Tensor
    sequence: Tensor
    positions: Tensor
    caches: tuple[Tensor, Tensor]
    sees: Visibility

    def run(self, kernels: Kernels) -> Tensor:
        at = Paged(self.tables, self.sequence, self.positions)
        out = torch.full((len(self.q), self.q.shape[1] * self.caches[1].shape[3]), float("nan"))
        return kernels.attention(self.q, self.caches, at, self.sees, out)

    def rows(self, chosen: list[int]) -> "PagedCase":
        """The same cache, but only these query rows."""
        at = torch.tensor(chosen, dtype=torch.int64)
        parts = (self.q[at], self.sequence[at], self.positions[at])
        return replace(self, q=parts[0], sequence=parts[1], positions=parts[2])

    def laid_out(self, block_size: int, seed: int) -> "PagedCase":
        """The same sequences in blocks of another size, shuffled; what no sequence uses is NaN."""
        sequences, length, kv_heads, _ = self.kv[0].shape
        per = -(-length // block_size)
        blocks = sequences * per + 3
        order = torch.randperm(blocks, generator=generator(seed))[: sequences * per]
        tables = order.view(sequences, per)
        caches = []
        for rows in self.kv:
            depth = rows.shape[3]
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
    chunk: int = 0,
    sinks: bool = False,
    width: int = 0,
) -> PagedCase:
    """Every position of every sequence is a query row, sequence after sequence; values are as wide as keys if 0."""
    shape = (len(lengths), max(lengths), kv_heads)
    kv = (normal(*shape, depth, seed=seed), normal(*shape, width or depth, seed=seed + 1))
    sequence = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    positions = torch.cat([torch.arange(length) for length in lengths])
    q = normal(len(sequence), heads, depth, seed=seed + 2)
    nothing = torch.empty(0, dtype=torch.int32)
    beside = normal(heads, seed=seed + 3) if sinks else None
    sees = Visibility(depth**-0.5, window, chunk, beside)
    case = PagedCase(q, kv, nothing, sequence.int(), positions.int(), kv, sees)
    return case.laid_out(block_size, seed)


@dataclass(frozen=True)
class ExpertCase:
    x: Tensor
    experts: dict[int, tuple[Weight, ...]]
    tokens: Tensor
    ids: Tensor
    activation: str = "silu"

    def run(self, kernels: Kernels) -> Tensor:
        out = torch.full((len(self.ids), self.x.shape[1]), float("nan"))
        return kernels.experts(self.x, kernels.expert_table(self.experts), self.tokens, self.ids, self.activation, out)

    def parts(self, chosen: list[int]) -> "ExpertCase":
        """Only these parts, on a copy of x that holds nothing but their rows."""
        at = torch.tensor(chosen, dtype=torch.int64)
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
    biased: bool = False,
) -> ExpertCase:
    """Every row chooses top_k experts; ids are ascending. Logical ids have gaps: 0, 2, 4, ..."""
    shapes = ((inner, hidden), (inner, hidden), (hidden, inner))
    weights: dict[int, tuple[Weight, ...]] = {
        2 * e: tuple(matrix(*shape, seed + 10 * e + i, dtype, 0.1) for i, shape in enumerate(shapes))
        for e in range(experts)
    }
    if biased:
        for e, given in weights.items():
            weights[e] = given + tuple(normal(weight.shape[0], seed=seed + e + i) for i, weight in enumerate(given))
    chosen = torch.rand(rows, experts, generator=generator(seed)).argsort(1)[:, :top_k]
    order = chosen.flatten().sort(stable=True)
    tokens = (order.indices // top_k).int()
    x = normal(rows, hidden, seed=seed + 1)
    return ExpertCase(x, weights, tokens, (order.values * 2).int(), activation)
