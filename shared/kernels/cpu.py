"""``Kernels`` on CPU: checks shapes, turns tensors into addresses and calls the numba kernels.

Activations and the KV cache are fp32; weights are fp32, bf16 or fp16 and are read where they lie.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

import numba
import numpy as np
import torch
from torch import Tensor

from shared.kernels import cpu_attention, cpu_elementwise, cpu_experts, cpu_linear
from shared.kernels.base import ExpertTable
from shared.kernels.cache import compile_once
from shared.kernels.jit import KIND_BF16, KIND_FP16, KIND_FP32
from shared.kernels.program import Tape, compile_operation
from shared.models.spec import RouterSpec

_KINDS = {
    torch.float32: KIND_FP32,
    torch.bfloat16: KIND_BF16,
    torch.float16: KIND_FP16,
}
_ACTIVATIONS = {
    "silu": cpu_elementwise.SILU,
    "gelu": cpu_elementwise.GELU,
    "gelu_pytorch_tanh": cpu_elementwise.GELU_TANH,
}
T = TypeVar("T")
_OPERATIONS = {
    "add": cpu_elementwise.add_operation,
    "attention": cpu_attention.attention_operation,
    "experts": cpu_experts.experts_operation,
    "linear": cpu_linear.linear_operation,
    "rms_norm": cpu_elementwise.rms_norm_operation,
    "rope": cpu_elementwise.rope_operation,
    "store_rows": cpu_elementwise.store_rows_operation,
    "take": cpu_elementwise.take_operation,
}
"""Kernels that can be recorded."""
_PARALLEL_WORK = 1 << 18
"""Multiplications below which a second thread costs more than it brings."""


@dataclass(frozen=True)
class CpuExpertTable:
    """Addresses of the resident experts' weights, and the tensors that keep them mapped."""

    addresses: np.ndarray
    """int64 [highest id + 1, 3]: gate, up, down; 0 = not resident."""
    kind: int
    hidden: int
    expert_hidden: int
    tensors: dict[int, tuple[Tensor, ...]]

    @property
    def resident(self) -> frozenset[int]:
        return frozenset(self.tensors)


class CpuKernels:
    """``Kernels`` with a fixed order of operations per output row. Call it from one thread at a time.

    Args:
        threads: compute threads; 0 = as many as ``NUMBA_NUM_THREADS`` allows.

    Methods raise ValueError for shapes that do not fit and TypeError for dtypes that are not taken.
    """

    def __init__(self, threads: int) -> None:
        limit = numba.config.NUMBA_NUM_THREADS  # type: ignore[attr-defined]
        self.threads = min(threads, limit) if threads > 0 else limit
        torch.set_num_threads(self.threads)
        self._tape: Tape | None = None
        directory = numba.config.CACHE_DIR  # type: ignore[attr-defined]
        compile_once(Path(directory) if directory else None, self.compile)

    @cached_property
    def _project(self) -> Any:
        return cpu_linear.compile_project()

    @cached_property
    def _attend(self) -> Any:
        return cpu_attention.compile_attend()

    @cached_property
    def _operations(self) -> dict[str, Any]:
        return {name: compile_operation(operation) for name, operation in _OPERATIONS.items()}

    def record(self, call: Callable[[], T]) -> Callable[[], T]:
        """See ``Kernels.record``; ``call`` runs now, but none of its arithmetic."""
        self._tape = tape = Tape()
        try:
            result = call()
        finally:
            self._tape = None
        return tape.finish(result)

    def _do(self, function: Any, kept: tuple[object, ...], *arguments: Any) -> bool:
        """Run a numba kernel, or write it down; ``kept`` is what its addresses point to."""
        if self._tape is None:
            return function(*arguments)
        flat: list[int | float] = []
        for argument in arguments:
            flat += argument if isinstance(argument, tuple) else (argument,)
        name = function.__name__
        self._tape.add(name, self._operations[name].address, tuple(flat), kept)
        return True

    def compile(self) -> None:
        """Compile every kernel, or load it from the cache: a first call takes no longer than any other after this."""
        x, weight = torch.zeros(2, 16), torch.zeros(16, 16, dtype=torch.bfloat16)
        norm, positions, pair = torch.ones(16), torch.zeros(2, dtype=torch.int32), torch.zeros(2, 1)
        cache, slots = torch.zeros(1, 1, 1, 16), torch.zeros(2, dtype=torch.int64)
        heads = x.view(2, 1, 16)
        self.take(weight, slots, x)
        self.add(x, x)
        self.linear(x, weight)
        self.rms_norm(x, norm, 1e-6)
        self.rope(heads, pair, pair, positions)
        self.store_kv(cache, heads, slots)
        self.attention(heads, cache, cache, positions.view(2, 1), positions, positions, 1.0)
        self.route(x, weight, RouterSpec(experts=16, top_k=2))
        table = self.expert_table({0: (weight, weight, weight)})
        self.experts(x, table, positions, positions, "silu", torch.empty(2, 16))
        self.combine(x, [heads.view(2, 16)], positions.view(2, 1), positions.view(2, 1), pair)
        self.record(lambda: self.add(x, x))()

    def take(self, table: Tensor, ids: Tensor, out: Tensor) -> Tensor:
        """out[t] = row ids[t] of table [N, D], as fp32."""
        count, depth = table.shape
        _expect(table.is_contiguous() and _is(ids, torch.int64), "the table must be contiguous, ids int64")
        _output(out, (len(ids), depth))
        addresses = (table.data_ptr(), _kind(table), ids.data_ptr(), out.data_ptr())
        _expect(
            self._do(cpu_elementwise.take, (table, ids, out), *addresses, len(ids), depth, count),
            "ids must be below {}",
            count,
        )
        return out

    def add(self, x: Tensor, y: Tensor) -> None:
        """x += y."""
        _expect(_is(x, torch.float32) and _is(y, torch.float32), "x and y must be contiguous fp32")
        _expect(x.shape == y.shape, "shapes {} and {} differ", x.shape, y.shape)
        self._do(cpu_elementwise.add, (x, y), x.data_ptr(), y.data_ptr(), x.numel())

    def linear(self, x: Tensor, weight: Tensor, bias: Tensor | None = None, out: Tensor | None = None) -> Tensor:
        """x [T, K] @ weight [N, K].T (+ bias [N]) -> fp32 [T, N]."""
        x = _rows(x)
        (rows, depth), cols = x.shape, weight.shape[0]
        _expect(weight.shape == (cols, depth), "weight {} for rows of {}", weight.shape, depth)
        _expect(bias is None or bias.shape == (cols,), "bias must have {} entries", cols)
        _expect(weight.is_contiguous(), "weights must be contiguous")
        out = _output(out, (rows, cols))
        offsets = None if bias is None else _rows(bias)
        threads = self.threads if rows * depth * cols >= _PARALLEL_WORK else 1
        self._do(
            cpu_linear.linear,
            (x, weight, offsets, out),
            threads,
            self._project.address,
            x.data_ptr(),
            weight.data_ptr(),
            _kind(weight),
            0 if offsets is None else offsets.data_ptr(),
            out.data_ptr(),
            rows,
            depth,
            cols,
        )
        return out

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float, out: Tensor | None = None) -> Tensor:
        """Root-mean-square norm over the last dimension."""
        x = _rows(x)
        depth = x.shape[-1]
        _expect(weight.shape == (depth,) and weight.is_contiguous(), "weight {} for rows of {}", weight.shape, depth)
        out = _output(out, x.shape)
        addresses = (x.data_ptr(), weight.data_ptr(), _kind(weight))
        sizes = (out.data_ptr(), x.numel() // depth, depth)
        self._do(cpu_elementwise.rms_norm, (x, weight, out), *addresses, float(eps), *sizes)
        return out

    def rope(self, x: Tensor, cos: Tensor, sin: Tensor, positions: Tensor) -> None:
        """Rotate x [T, heads, D] in place."""
        rows, heads, depth = x.shape
        count, half = cos.shape
        _expect(_is(x, torch.float32) and _is(positions, torch.int32), "x must be fp32, positions int32, contiguous")
        _expect(_is(cos, torch.float32) and _is(sin, torch.float32) and sin.shape == cos.shape, "cos and sin differ")
        _expect(
            2 * half <= depth and positions.shape == (rows,), "{} pairs in {} dimensions of {} rows", half, depth, rows
        )
        done = self._do(
            cpu_elementwise.rope,
            (x, cos, sin, positions),
            x.data_ptr(),
            cos.data_ptr(),
            sin.data_ptr(),
            positions.data_ptr(),
            rows,
            heads,
            depth,
            half,
            count,
        )
        _expect(done, "positions must be below {}", count)

    def store_kv(self, cache: Tensor, rows: Tensor, slots: Tensor) -> None:
        """cache [blocks, block_size, kv_heads, D] viewed as slots; rows [T, kv_heads, D]."""
        rows = _rows(rows)
        _expect(_is(cache, torch.float32) and _is(slots, torch.int64), "cache must be fp32, slots int64, contiguous")
        _expect(rows.shape[1:] == cache.shape[2:] and slots.shape == rows.shape[:1], "rows do not fit the cache")
        room, depth = cache.shape[0] * cache.shape[1], cache.shape[2] * cache.shape[3]
        addresses = (cache.data_ptr(), rows.data_ptr(), slots.data_ptr())
        done = self._do(cpu_elementwise.store_rows, (cache, rows, slots), *addresses, len(slots), depth, room)
        _expect(done, "slots must be below {}", room)

    def attention(
        self,
        q: Tensor,
        k_cache: Tensor,
        v_cache: Tensor,
        tables: Tensor,
        sequence: Tensor,
        positions: Tensor,
        scale: float,
        window: int = 0,
        out: Tensor | None = None,
    ) -> Tensor:
        """Causal attention of T query rows over the paged cache -> [T, heads * D]."""
        q = _rows(q)
        rows, heads, depth = q.shape
        blocks, block_size, kv_heads, _ = k_cache.shape
        _expect(_is(k_cache, torch.float32) and _is(v_cache, torch.float32), "caches must be fp32 and contiguous")
        _expect(k_cache.shape == v_cache.shape and k_cache.shape[3] == depth, "q and the caches do not fit")
        _expect(heads % kv_heads == 0, "{} heads over {} key-value heads", heads, kv_heads)
        indices = (tables, sequence, positions)
        _expect(all(_is(index, torch.int32) for index in indices), "tables, sequence and positions must be int32")
        _expect(sequence.shape == positions.shape == (rows,), "sequence and positions must have {} entries", rows)
        out = _output(out, (rows, heads * depth))
        addresses = tuple(tensor.data_ptr() for tensor in (q, k_cache, v_cache, *indices, out))
        sizes = (rows, heads, kv_heads, depth, blocks, block_size, *tables.shape)
        kept = (q, k_cache, v_cache, indices, out)
        settings = (window, float(scale))
        done = self._do(cpu_attention.attention, kept, self.threads, self._attend.address, addresses, sizes, *settings)
        _expect(done, "a row needs a cache block that its table does not name")
        return out

    def route(self, x: Tensor, weight: Tensor, router: RouterSpec) -> tuple[Tensor, Tensor]:
        """Gate: (weights fp32 [T, k], ids int32 [T, k]), largest first, ties to the lowest id."""
        logits = self.linear(x, weight)
        rows, experts = logits.shape
        _expect(router.score == "softmax", "gate score {!r}; known is softmax", router.score)
        _expect(0 < router.top_k <= experts, "top {} of {} experts", router.top_k, experts)
        weights = torch.empty(rows, router.top_k)
        ids = torch.empty(rows, router.top_k, dtype=torch.int32)
        cpu_elementwise.choose(
            logits.data_ptr(),
            weights.data_ptr(),
            ids.data_ptr(),
            rows,
            experts,
            router.top_k,
            int(router.normalise),
        )
        return weights, ids

    def expert_table(self, experts: Mapping[int, Sequence[Tensor]]) -> CpuExpertTable:
        """Logical id -> (gate [I, H], up [I, H], down [H, I]), all of one shape and dtype."""
        addresses = np.zeros((max(experts, default=-1) + 1, 3), np.int64)
        if not experts:
            return CpuExpertTable(addresses, 0, 0, 0, {})
        first = next(iter(experts.values()))[0]
        inner, width = first.shape
        shapes = ((inner, width), (inner, width), (width, inner))
        for expert, weights in experts.items():
            fits = tuple(tuple(weight.shape) for weight in weights) == shapes
            _expect(
                fits and all(_is(weight, first.dtype) for weight in weights),
                "expert {}: its weights differ in shape or dtype from others",
                expert,
            )
            addresses[expert] = [weight.data_ptr() for weight in weights]
        tensors = {expert: tuple(weights) for expert, weights in experts.items()}
        return CpuExpertTable(addresses, _kind(first), width, inner, tensors)

    def experts(
        self, x: Tensor, table: ExpertTable, tokens: Tensor, ids: Tensor, activation: str, out: Tensor
    ) -> Tensor:
        """Part p is expert ids[p] applied to row tokens[p]; ids ascending; out fp32 [P, H]."""
        if not isinstance(table, CpuExpertTable):
            raise TypeError("the expert table was made by other kernels")
        x = _rows(x)
        parts = len(ids)
        _expect(activation in _ACTIVATIONS, "activation {!r}; known are {}", activation, list(_ACTIVATIONS))
        _expect(_is(tokens, torch.int32) and _is(ids, torch.int32), "tokens and ids must be int32 and contiguous")
        _expect(tokens.shape == ids.shape, "tokens and ids must have one entry per part")
        if parts == 0:
            return out
        _expect(x.shape[1] == table.hidden, "rows of {} for experts of {}", x.shape[1], table.hidden)
        _output(out, (parts, table.hidden))
        tensors = (x.data_ptr(), tokens.data_ptr(), ids.data_ptr())
        addresses = (*tensors, table.addresses.ctypes.data, out.data_ptr())
        sizes = (x.shape[0], table.hidden, table.expert_hidden, parts, len(table.addresses))
        work = 3 * parts * table.hidden * table.expert_hidden
        threads = self.threads if work >= _PARALLEL_WORK else 1
        done = self._do(
            cpu_experts.experts,
            (x, tokens, ids, table, out),
            threads,
            self._project.address,
            addresses,
            sizes,
            table.kind,
            _ACTIVATIONS[activation],
        )
        _expect(done, "ids must be ascending and resident, tokens must be rows of x")
        return out

    def combine(self, out: Tensor, rows: Sequence[Tensor], source: Tensor, index: Tensor, weights: Tensor) -> None:
        """out [T, H] += sum over j of weights[t, j] * rows[source[t, j]][index[t, j]]."""
        count, depth = out.shape
        _output(out, (count, depth))
        shape = (count, source.shape[1])
        _expect(source.shape == index.shape == weights.shape == shape, "source, index and weights must be [T, k]")
        _expect(_is(source, torch.int32) and _is(index, torch.int32), "source and index must be int32")
        _expect(_is(weights, torch.float32), "weights must be fp32")
        for part in rows:
            _expect(_is(part, torch.float32) and part.shape[1] == depth, "parts must be fp32 rows of {}", depth)
        parts = np.array([(part.data_ptr(), len(part)) for part in rows], np.int64).reshape(-1, 2)
        done = cpu_elementwise.combine(
            out.data_ptr(), parts, source.data_ptr(), index.data_ptr(), weights.data_ptr(), *shape, depth
        )
        _expect(done, "source and index must name rows that were given")


def _expect(condition: bool, problem: str, *values: object) -> None:
    """Raise ValueError with ``problem`` (a format string: nothing is formatted while all is well)."""
    if not condition:
        raise ValueError(problem.format(*values))


def _is(tensor: Tensor, dtype: torch.dtype) -> bool:
    return tensor.dtype is dtype and tensor.is_contiguous()


def _rows(x: Tensor) -> Tensor:
    """``x`` as contiguous fp32; itself when it is that already."""
    return x if _is(x, torch.float32) else x.float().contiguous()


def _output(out: Tensor | None, shape: tuple[int, ...]) -> Tensor:
    if out is None:
        return torch.empty(shape)
    _expect(_is(out, torch.float32) and out.shape == shape, "out must be contiguous fp32 {}", shape)
    return out


def _kind(weight: Tensor) -> int:
    if weight.dtype not in _KINDS:
        raise TypeError(f"weights must be fp32, bf16 or fp16, not {weight.dtype}")
    return _KINDS[weight.dtype]
