"""The part of ``CpuKernels`` that treats rows one by one: checks, then calls into cpu_elementwise."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from shared.kernels import cpu_elementwise
from shared.kernels.cpu_checks import expect, head_strides, is_plain, row_stride, weight_kind
from shared.kernels.recorder import Recorder


class RowKernels(Recorder):
    """See ``Kernels``; activations are fp32. Methods raise ValueError for what does not fit."""

    def take(self, table: Tensor, ids: Tensor, out: Tensor) -> Tensor:
        """out[t] = row ids[t] of table [N, D], as fp32."""
        count, depth = table.shape
        expect(table.is_contiguous() and is_plain(ids, torch.int64), "the table must be contiguous, ids int64")
        self._output(out, (len(ids), depth))
        addresses = (table.data_ptr(), weight_kind(table), ids.data_ptr(), out.data_ptr())
        expect(self._do(cpu_elementwise.take, *addresses, len(ids), depth, count), "ids must be below {}", count)
        return out

    def add(self, x: Tensor, y: Tensor, scale: float = 1.0) -> None:
        """x += scale * y."""
        _same(x, y)
        self._do(cpu_elementwise.add, x.data_ptr(), y.data_ptr(), x.numel(), float(scale))

    def gated_add(self, x: Tensor, y: Tensor, gate: Tensor) -> None:
        """x += sigmoid(gate) * y."""
        _same(x, y)
        expect(is_plain(gate, torch.float32) and gate.numel() == len(x), "the gate must be fp32 with one entry a row")
        self._do(cpu_elementwise.gated_add, x.data_ptr(), y.data_ptr(), gate.data_ptr(), *x.shape)

    def scale(self, x: Tensor, factor: float) -> None:
        """x *= factor."""
        _same(x, x)
        self._do(cpu_elementwise.scale, x.data_ptr(), x.numel(), float(factor))

    def scale_rows(self, x: Tensor, factors: Tensor, index: Tensor) -> None:
        """x[t] *= factors[index[t]]."""
        _same(x, x)
        expect(is_plain(factors, torch.float32) and is_plain(index, torch.int32), "factors are fp32, index int32")
        expect(index.shape == (len(x),), "index must have {} entries", len(x))
        sizes = (len(x), x.numel() // max(1, len(x)), len(factors))
        done = self._do(cpu_elementwise.scale_rows, x.data_ptr(), factors.data_ptr(), index.data_ptr(), *sizes)
        expect(done, "index must be below {}", len(factors))

    def clip(self, x: Tensor, limit: float) -> None:
        """Bound x to -limit .. limit."""
        _same(x, x)
        self._do(cpu_elementwise.clip, x.data_ptr(), x.numel(), float(limit))

    def copy(self, x: Tensor, out: Tensor) -> Tensor:
        """out = x for views [T, heads, D]."""
        expect(x.shape == out.shape, "shapes {} and {} differ", x.shape, out.shape)
        self._do(cpu_elementwise.copy, x.data_ptr(), *head_strides(x), out.data_ptr(), *head_strides(out), *x.shape)
        return out

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float, out: Tensor | None = None) -> Tensor:
        """Root-mean-square norm over the last dimension; 2-D views may have rows further apart."""
        depth = x.shape[-1]
        expect(weight.shape == (depth,) and weight.is_contiguous(), "weight {} for rows of {}", weight.shape, depth)
        out = self._output(None, x.shape) if out is None else out
        expect(out.shape == x.shape, "out must be {}", x.shape)
        source, target = (x.data_ptr(), row_stride(x)), (out.data_ptr(), row_stride(out))
        norm = (weight.data_ptr(), weight_kind(weight), float(eps))
        self._do(cpu_elementwise.rms_norm, *source, *norm, *target, x.numel() // depth, depth)
        return out

    def layer_norm(self, x: Tensor, weight: Tensor, bias: Tensor, eps: float, out: Tensor | None = None) -> Tensor:
        """Layer norm over the last dimension."""
        x, depth = self._plain(x), x.shape[-1]
        fits = weight.shape == bias.shape == (depth,) and weight.dtype is bias.dtype
        expect(fits and weight.is_contiguous() and bias.is_contiguous(), "weight and bias do not fit rows of {}", depth)
        out = self._output(out, x.shape)
        norm = (weight.data_ptr(), bias.data_ptr(), weight_kind(weight), float(eps))
        self._do(cpu_elementwise.layer_norm, x.data_ptr(), *norm, out.data_ptr(), x.numel() // depth, depth)
        return out

    def rope(self, x: Tensor, cos: Tensor, sin: Tensor, positions: Tensor, interleaved: bool = False) -> None:
        """Rotate the views x [T, heads, D] in place."""
        rows, heads, depth = x.shape
        count, half = cos.shape
        tables = is_plain(cos, torch.float32) and is_plain(sin, torch.float32) and sin.shape == cos.shape
        expect(tables and is_plain(positions, torch.int32), "cos and sin must be fp32 of one shape, positions int32")
        expect(
            2 * half <= depth and positions.shape == (rows,), "{} pairs in {} dimensions of {} rows", half, depth, rows
        )
        where = (x.data_ptr(), *head_strides(x), cos.data_ptr(), sin.data_ptr(), positions.data_ptr())
        done = self._do(cpu_elementwise.rope, *where, (rows, heads, half, count), int(interleaved))
        expect(done, "positions must be below {}", count)

    def store_kv(self, cache: Tensor, rows: Tensor, slots: Tensor) -> None:
        """cache [blocks, block_size, kv_heads, D] viewed as slots; rows [T, kv_heads, D]."""
        rows = self._plain(rows)
        expect(is_plain(cache, torch.float32) and is_plain(slots, torch.int64), "cache must be fp32, slots int64")
        expect(rows.shape[1:] == cache.shape[2:] and slots.shape == rows.shape[:1], "rows do not fit the cache")
        room, depth = cache.shape[0] * cache.shape[1], cache.shape[2] * cache.shape[3]
        done = self._do(
            cpu_elementwise.store_rows, cache.data_ptr(), rows.data_ptr(), slots.data_ptr(), len(slots), depth, room
        )
        expect(done, "slots must be below {}", room)

    def combine(self, out: Tensor, rows: Sequence[Tensor], source: Tensor, index: Tensor, weights: Tensor) -> None:
        """out [T, H] += sum over j of weights[t, j] * rows[source[t, j]][index[t, j]]."""
        count, depth = out.shape
        self._output(out, (count, depth))
        shape = (count, source.shape[1])
        expect(source.shape == index.shape == weights.shape == shape, "source, index and weights must be [T, k]")
        expect(is_plain(source, torch.int32) and is_plain(index, torch.int32), "source and index must be int32")
        expect(is_plain(weights, torch.float32), "weights must be fp32")
        for part in rows:
            expect(is_plain(part, torch.float32) and part.shape[1] == depth, "parts must be fp32 rows of {}", depth)
        parts = np.array([(part.data_ptr(), len(part)) for part in rows], np.int64).reshape(-1, 2)
        done = self._do(
            cpu_elementwise.combine,
            out.data_ptr(),
            parts,
            source.data_ptr(),
            index.data_ptr(),
            weights.data_ptr(),
            *shape,
            depth,
        )
        expect(done, "source and index must name rows that were given")


def _same(x: Tensor, y: Tensor) -> None:
    expect(is_plain(x, torch.float32) and is_plain(y, torch.float32), "x and y must be contiguous fp32")
    expect(x.shape == y.shape, "shapes {} and {} differ", x.shape, y.shape)
