"""``Kernels`` on CPU: checks shapes, turns tensors into addresses and calls the numba kernels.

Activations and the KV cache are fp32; weights are fp32, bf16, fp16 or blocks of fp8 and are read where they lie.
"""

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numba
import numpy as np
import torch
from torch import Tensor

from shared.activation import Choice
from shared.kernels import (
    amx,
    amx_blocks,
    cpu_amx,
    cpu_amx_experts,
    cpu_attention,
    cpu_elementwise,
    cpu_experts,
    cpu_linear,
    cpu_mla,
    cpu_router,
    pairs,
)
from shared.kernels.base import ExpertTable, Paged, Visibility
from shared.kernels.cache import compile_once
from shared.kernels.cpu_answer import Answer, gather
from shared.kernels.cpu_checks import expect, head_strides, is_plain, located, weight_kind
from shared.kernels.cpu_rowwise import RowKernels
from shared.kernels.jit import KIND_BF16, KIND_FP32
from shared.kernels.recorder import Tape
from shared.kernels.weights import Weight, expert_bytes
from shared.models.spec import RouterSpec

_ACTIVATIONS = {
    "silu": cpu_elementwise.SILU,
    "gelu": cpu_elementwise.GELU,
    "gelu_pytorch_tanh": cpu_elementwise.GELU_TANH,
    "clamped_swiglu": cpu_elementwise.CLAMPED_SWIGLU,
}
log = logging.getLogger(__name__)

_PARALLEL_WORK = 1 << 18
"""Multiplications below which a second thread costs more than it brings."""


@dataclass(frozen=True)
class CpuExpertTable:
    """Addresses of the resident experts' weights, and the weights, which keeps them mapped."""

    addresses: np.ndarray
    """int64 [highest id + 1, 6]: gate, up, down, 0 = not resident; then their biases, 0 = none."""
    kind: int
    hidden: int
    expert_hidden: int
    weights: dict[int, tuple[Weight, ...]]

    @property
    def resident(self) -> frozenset[int]:
        return frozenset(self.weights)

    @property
    def nbytes(self) -> int:
        return expert_bytes(self.weights)

    def without(self, experts: frozenset[int]) -> "CpuExpertTable":
        addresses = self.addresses.copy()
        addresses[[e for e in experts if e in self.weights]] = 0
        return replace(self, addresses=addresses, weights={e: w for e, w in self.weights.items() if e not in experts})


class CpuKernels(RowKernels):
    """``Kernels`` with a fixed order of operations per output row. Call it from one thread at a time.

    Args:
        threads: compute threads; 0 = as many as ``NUMBA_NUM_THREADS`` allows.
        tiles: multiply bf16 weights on AMX tiles where there are some, or in AVX-512's pairs. Results differ in their
            last bits from those of CPUs without.
        precise: use all of the rows that are multiplied; else they are rounded to bf16 where that is faster.

    Methods raise ValueError for shapes that do not fit and TypeError for dtypes that are not taken.
    """

    def __init__(self, threads: int, tiles: bool = True, precise: bool = True) -> None:
        limit = numba.config.NUMBA_NUM_THREADS  # type: ignore[attr-defined]
        self.threads = min(threads, limit) if threads > 0 else limit
        self.tiles = tiles and amx.available()
        self._parts = amx.MOST_PARTS if precise else 1
        self.pairs = tiles and not precise and not self.tiles and pairs.available()
        how = "on AMX tiles" if self.tiles else "in pairs" if self.pairs else "in fp32"
        rounded = self.pairs or (self.tiles and not precise)
        way = f"{how}, rows {'rounded to bf16' if rounded else 'as they are'}"
        log.info("bf16 weights are multiplied %s", way)
        torch.set_num_threads(1)  # it only copies; a second team of threads would queue for the cores of ours
        directory = numba.config.CACHE_DIR  # type: ignore[attr-defined]
        compile_once(Path(directory) if directory else None, self.compile)

    @cached_property
    def _project(self) -> Any:
        return cpu_linear.compile_project()

    @cached_property
    def _project_pairs(self) -> Any:
        return pairs.compile_project()

    def _projecting(self, kind: int, parts: int) -> int:
        """Address of the routine for weights of a kind, and rows of which so many parts count."""
        in_pairs = self.pairs and kind == KIND_BF16 and parts == 1
        return (self._project_pairs if in_pairs else self._project).address

    @cached_property
    def _tile_code(self) -> tuple[Any, ...]:
        return amx_blocks.compile_routines()  # kept, for what is at their addresses lives no longer

    @cached_property
    def _tile_routines(self) -> tuple[int, ...]:
        return tuple(routine.address for routine in self._tile_code)

    @cached_property
    def _attend(self) -> Any:
        return cpu_attention.compile_attend()

    def compile(self) -> None:
        """Compile every kernel, or load it from the cache: a first call takes no longer than any other after this."""
        x, weight, plain = torch.zeros(2, 16), torch.zeros(16, 16, dtype=torch.bfloat16), torch.zeros(16, 16)
        norm, positions, pair = torch.ones(16), torch.zeros(2, dtype=torch.int32), torch.zeros(2, 1)
        cache, slots = torch.zeros(1, 1, 1, 16), torch.zeros(2, dtype=torch.int64)
        heads, at = x.view(2, 1, 16), Paged(positions.view(2, 1), positions, positions)
        self.take(weight, slots, x)
        self.add(x, x)
        self.gated_add(x, x, pair)
        self.scale(x, 1.0)
        self.scale_rows(x, norm, positions)
        self.clip(x, 1.0)
        self.copy(heads, heads)
        self.linear(x, weight)
        self.linear(x, plain)
        self.head_linear(heads, weight.view(1, 16, 16), heads)
        self.rms_norm(x, norm, 1e-6)
        self.layer_norm(x, norm, norm, 1e-6)
        self.rope(heads, pair, pair, positions)
        self.store_kv(cache, heads, slots)
        self.attention(heads, (cache, cache), at, Visibility(1.0), torch.empty(2, 16))
        self.route(x, weight, RouterSpec(experts=16, top_k=2))
        for matrix in (weight, plain):
            table = self.expert_table({0: (matrix, matrix, matrix)})
            self.experts(x, table, positions, positions, "silu", torch.empty(2, 16))
        answering = self.answering(partial(self.route, x, weight, RouterSpec(experts=16, top_k=1)), x, table, "silu")
        homes, counts, meta = np.ones(16, np.uint64), np.zeros((2, 16), np.int64), np.zeros(24, np.uint8)
        answering(torch.zeros(2, 16), Choice(homes, 1, 0), meta, torch.empty(2, 16), counts)
        self.gather(x, np.zeros((0, 4), np.int64), homes, np.empty((2, 1), np.uint32))
        self.combine(x, [heads.view(2, 16)], positions.view(2, 1), positions.view(2, 1), pair)

    def linear(self, x: Tensor, weight: Weight, bias: Tensor | None = None, out: Tensor | None = None) -> Tensor:
        """x [T, K] @ weight [N, K].T (+ bias [N]) -> fp32 [T, N]."""
        return self._linear(x, weight, bias, out, self._parts)

    def _linear(self, x: Tensor, weight: Weight, bias: Tensor | None, out: Tensor | None, parts: int) -> Tensor:
        x = self._plain(x)
        (rows, depth), cols = x.shape, weight.shape[0]
        expect(weight.shape == (cols, depth), "weight {} for rows of {}", weight.shape, depth)
        expect(bias is None or bias.shape == (cols,), "bias must have {} entries", cols)
        out = self._output(out, (rows, cols))
        offsets = None if bias is None else self._plain(bias)
        (address, kind), threads = located(weight), self._threads(rows * depth * cols)
        read, sizes = (x.data_ptr(), address), (rows, depth, cols)
        written = (0 if offsets is None else offsets.data_ptr(), out.data_ptr())
        if self._tiled(kind):
            self._do(cpu_amx.linear, threads, self._tile_routines, parts, *read, *written, *sizes)
        else:
            self._do(cpu_linear.linear, threads, self._projecting(kind, parts), *read, kind, *written, *sizes)
        return out

    def head_linear(self, x: Tensor, weight: Tensor, out: Tensor) -> Tensor:
        """out[t, h] = weight[h] @ x[t, h]; the rows of each head's weight lie together, heads may lie apart."""
        x = self._plain(x)
        (rows, heads, depth), cols = x.shape, weight.shape[1]
        expect(weight.shape == (heads, cols, depth), "weight {} for {} heads of {}", weight.shape, heads, depth)
        expect(weight.stride()[1:] == (depth, 1), "each head's weight must be contiguous")
        expect(out.shape == (rows, heads, cols), "out must be {}", (rows, heads, cols))
        strides = (weight.stride(0) * weight.itemsize, *head_strides(out))
        weights, sizes = (weight.data_ptr(), weight_kind(weight)), (rows, heads, depth, cols)
        threads = self._threads(rows * heads * depth * cols)
        self._do(
            cpu_mla.head_linear, threads, self._project.address, x.data_ptr(), *weights, out.data_ptr(), sizes, strides
        )
        return out

    def attention(self, q: Tensor, caches: tuple[Tensor, Tensor], at: Paged, sees: Visibility, out: Tensor) -> Tensor:
        """Causal attention of T query rows over the paged cache -> out [T, heads * V]."""
        q, (keys, values) = self._plain(q), caches
        rows, heads, depth = q.shape
        blocks, block_size, kv_heads, width = values.shape
        stride = values.stride(2)
        expect(is_plain(keys, torch.float32) and values.dtype is torch.float32, "caches must be fp32 and contiguous")
        fits = keys.shape[:3] == values.shape[:3] and keys.shape[3] == depth
        apart = (block_size * kv_heads * stride, kv_heads * stride, stride, 1)
        expect(fits and values.stride() == apart, "q and the caches do not fit")
        expect(heads % kv_heads == 0, "{} heads over {} key-value heads", heads, kv_heads)
        indices = (at.tables, at.sequence, at.positions)
        expect(all(is_plain(index, torch.int32) for index in indices), "tables, sequence, positions must be int32")
        expect(at.sequence.shape == at.positions.shape == (rows,), "sequence, positions must have {} entries", rows)
        sinks = sees.sinks
        expect(sinks is None or (is_plain(sinks, torch.float32) and sinks.shape == (heads,)), "sinks must be [heads]")
        self._output(out, (rows, heads * width))
        read = tuple(tensor.data_ptr() for tensor in (q, keys, values, *indices))
        addresses = (*read, 0 if sinks is None else sinks.data_ptr(), out.data_ptr())
        sizes = (rows, heads, kv_heads, depth, width, stride, blocks, block_size, *at.tables.shape)
        span = (sees.window, sees.chunk)
        done = self._do(
            cpu_attention.attention, self.threads, self._attend.address, addresses, sizes, span, float(sees.scale)
        )
        expect(done, "a row needs a cache block that its table does not name")
        return out

    def route(
        self,
        x: Tensor,
        weight: Tensor,
        router: RouterSpec,
        bias: Tensor | None = None,
        correction: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Gate: (weights fp32 [T, k], ids int32 [T, k]), largest first, ties to the lowest id."""
        logits = self._linear(x, weight, bias, None, amx.MOST_PARTS)  # of scores close together the best must win
        rows, experts = logits.shape
        expect(router.score in cpu_router.SCORES, "gate score {!r} is unknown", router.score)
        eligible = experts // router.groups * router.top_groups
        expect(experts % router.groups == 0 and 0 < router.top_k <= eligible, "top {} of {}", router.top_k, eligible)
        offsets = None if correction is None else self._plain(correction)
        expect(offsets is None or offsets.shape == (experts,), "correction must have {} entries", experts)
        weights = torch.empty(rows, router.top_k)
        ids = torch.empty(rows, router.top_k, dtype=torch.int32)
        self._do(
            cpu_router.choose,
            logits.data_ptr(),
            0 if offsets is None else offsets.data_ptr(),
            weights.data_ptr(),
            ids.data_ptr(),
            (rows, experts, router.top_k, router.groups, router.top_groups),
            cpu_router.SCORES[router.score],
            int(router.group_score == "top2"),
            int(router.normalise),
            float(router.scale),
            float(router.jitter),
        )
        return weights, ids

    def expert_table(
        self, experts: Mapping[int, Sequence[Weight]], beside: ExpertTable | None = None
    ) -> CpuExpertTable:
        """Logical id -> (gate [I, H], up [I, H], down [H, I]) alike in shape and dtype, and fp32 biases or none."""
        if not isinstance(beside, CpuExpertTable | None):
            raise TypeError("the expert table was made by other kernels")
        if not experts:
            return beside or CpuExpertTable(np.zeros((0, 6), np.int64), 0, 0, 0, {})
        known = beside.weights if beside else {}
        first = next(iter((known or experts).values()))[0]
        (inner, width), kind = first.shape, located(first)[1]
        shapes = ((inner, width), (inner, width), (width, inner), (inner,), (inner,), (width,))
        addresses = np.zeros((max((*known, *experts)) + 1, 6), np.int64)
        if beside:
            addresses[: len(beside.addresses)] = beside.addresses[: len(addresses)]
        for expert, weights in experts.items():
            fits = len(weights) in (3, 6) and all(w.shape == s for w, s in zip(weights, shapes, strict=False))
            places = [located(weight) for weight in weights]
            alike = all(other == (kind if i < 3 else KIND_FP32) for i, (_, other) in enumerate(places))
            expect(fits and alike, "expert {}: its weights differ in shape or dtype from others", expert)
            addresses[expert, : len(weights)] = [address for address, _ in places]
        held = {**known, **{e: tuple(weights) for e, weights in experts.items()}}
        return CpuExpertTable(addresses, kind, width, inner, held)

    def experts(
        self, x: Tensor, table: ExpertTable, tokens: Tensor, ids: Tensor, activation: str, out: Tensor
    ) -> Tensor:
        """Part p is expert ids[p] applied to row tokens[p]; ids ascending; out fp32 [P, H]."""
        if not isinstance(table, CpuExpertTable):
            raise TypeError("the expert table was made by other kernels")
        x = self._plain(x)
        parts = len(ids)
        expect(activation in _ACTIVATIONS, "activation {!r}; known are {}", activation, list(_ACTIVATIONS))
        expect(is_plain(tokens, torch.int32) and is_plain(ids, torch.int32), "tokens and ids must be int32")
        expect(tokens.shape == ids.shape, "tokens and ids must have one entry per part")
        if parts == 0:
            return out
        expect(x.shape[1] == table.hidden, "rows of {} for experts of {}", x.shape[1], table.hidden)
        self._output(out, (parts, table.hidden))
        tensors = (x.data_ptr(), tokens.data_ptr(), ids.data_ptr())
        addresses = (*tensors, table.addresses.ctypes.data, out.data_ptr())
        sizes = (x.shape[0], table.hidden, table.expert_hidden, parts, len(table.addresses))
        threads = self._threads(3 * parts * table.hidden * table.expert_hidden)
        kind = _ACTIVATIONS[activation]
        if self._tiled(table.kind):
            done = self._do(cpu_amx_experts.experts, threads, self._tile_routines, self._parts, addresses, sizes, kind)
        else:
            project = self._projecting(table.kind, self._parts)
            done = self._do(cpu_experts.experts, threads, project, addresses, sizes, table.kind, kind)
        expect(done, "ids must be ascending and resident, tokens must be rows of x")
        return out

    def answering(
        self, route: Callable[[], tuple[Tensor, Tensor]], room: Tensor, table: ExpertTable, activation: str
    ) -> Answer:
        """See ``Kernels``."""
        self._tape = tape = Tape()
        try:
            routed = route()
            ids = routed[1].view(-1)
            out = torch.empty(len(ids), room.shape[1])
            self.experts(room, table, ids, ids, activation, out)
        finally:
            self._tape = None
        return Answer(tape, room, routed, table, out)

    def gather(self, out: Tensor, replies: np.ndarray, homes: np.ndarray, chosen: np.ndarray) -> int:
        """See ``Kernels``."""
        self._output(out, out.shape)
        expect(len(chosen) == len(out), "chosen experts of {} rows", len(out))
        return gather(out.data_ptr(), *out.shape, replies, homes, chosen)

    def _tiled(self, kind: int) -> bool:
        return self.tiles and kind == KIND_BF16

    def _threads(self, work: int) -> int:
        """Threads for so many multiplications."""
        return self.threads if work >= _PARALLEL_WORK else 1
