"""Kernels on CPU that treat rows one by one: norms, rotation, cache writes, combine, and plain arithmetic.

Loops are plain IEEE arithmetic without reassociation, so that LLVM may vectorise them and keep the bits; the only
reductions are the fixed-order ones of ``tiles``.
"""
# ruff: noqa: ANN001, ANN201, ANN202 - numba infers the types

import math

import numpy as np

from shared.kernels.jit import (
    BF16,
    FP16,
    FP32,
    I32,
    I64,
    KIND_BF16,
    KIND_FP32,
    helper,
    kernel,
    view1,
    view2,
)
from shared.kernels.tiles import bits_of, from_bits, lane_max, lane_sum, widen

SILU, GELU, GELU_TANH, CLAMPED_SWIGLU = 0, 1, 2, 3
_LIMIT, _ALPHA = np.float32(7.0), np.float32(1.702)  # of gpt-oss's activation
_MAGIC = np.float32(12582912.0)  # 1.5 * 2**23: adding it rounds to an integer, which is then in the low bits
_LOG2E = np.float32(1.44269504088896341)
_LN2_HIGH = np.float32(0.693359375)
_LN2_LOW = np.float32(-2.12194440e-4)
_LOWEST, _HIGHEST = np.float32(-104.0), np.float32(89.0)  # exp is 0 below and infinite above
_P0, _P1 = np.float32(1.9875691500e-4), np.float32(1.3981999507e-3)
_P2, _P3 = np.float32(8.3334519073e-3), np.float32(4.1665795894e-2)
_P4, _P5 = np.float32(1.6666665459e-1), np.float32(5.0000001201e-1)
_ONE, _TWO = np.float32(1.0), np.float32(2.0)
_HALF = np.float32(0.5)
_GELU_A, _GELU_B = np.float32(math.sqrt(2 / math.pi)), np.float32(0.044715)
_SQRT_HALF = math.sqrt(0.5)


@helper
def exp(x):
    """e**x in fp32 within 2 ulp, NaN for NaN; Cephes expf (Moshier) without branches, the same bits in any lane."""
    x = _LOWEST if x < _LOWEST else x
    x = _HIGHEST if x > _HIGHEST else x
    shifted = x * _LOG2E + _MAGIC
    n = shifted - _MAGIC
    r = x - n * _LN2_HIGH - n * _LN2_LOW
    p = ((((_P0 * r + _P1) * r + _P2) * r + _P3) * r + _P4) * r + _P5
    y = p * r * r + r + _ONE
    power = bits_of(shifted) - bits_of(_MAGIC)
    half = power >> np.int32(1)  # in two steps: 2**power itself may lie outside fp32
    rest = np.int32(power - half)
    return y * from_bits(np.int32((half + 127) << 23)) * from_bits(np.int32((rest + 127) << 23))


@helper
def activate(gate, up, kind):
    """gate[k] = activation(gate[k]) * up[k] for fp32 rows."""
    if kind == SILU:
        for k in range(len(gate)):
            gate[k] = gate[k] / (_ONE + exp(-gate[k])) * up[k]
    elif kind == GELU_TANH:  # x * (1 + tanh u) / 2 = x / (1 + exp(-2 u))
        for k in range(len(gate)):
            x = gate[k]
            u = _GELU_A * (x + _GELU_B * x * x * x)
            gate[k] = x / (_ONE + exp(-_TWO * u)) * up[k]
    elif kind == CLAMPED_SWIGLU:
        for k in range(len(gate)):
            x, y = min(gate[k], _LIMIT), max(-_LIMIT, min(up[k], _LIMIT))
            gate[k] = x / (_ONE + exp(-_ALPHA * x)) * (y + _ONE)
    else:
        for k in range(len(gate)):
            x = gate[k]
            gate[k] = _HALF * x * np.float32(1.0 + math.erf(x * _SQRT_HALF)) * up[k]


@helper
def softmax(row, n, scale):
    """row[k] = exp(scale * (row[k] - largest)) in place for k < n; returns the sum. ``scale`` is positive."""
    largest = lane_max(row, n)
    for k in range(n):
        row[k] = exp((row[k] - largest) * scale)
    return lane_sum(row, n)


@helper
def softmax_beside(row, n, scale, sink):
    """``softmax`` in which a score that is not in the row, ``sink`` (scaled already), takes its share of the sum."""
    largest, other = lane_max(row, n), sink / scale
    largest = other if other > largest else largest
    for k in range(n):
        row[k] = exp((row[k] - largest) * scale)
    return lane_sum(row, n) + exp((other - largest) * scale)


@helper
def _within(numbers, limit):
    wrong = 0
    for number in numbers:
        wrong += number < 0 or number >= limit
    return wrong == 0


@helper
def _widened(address, kind, n):
    """n weights at an address as fp32."""
    weights = np.empty(n, np.float32)
    single, brain, half = view1(address, n, FP32), view1(address, n, BF16), view1(address, n, FP16)
    for k in range(n):
        if kind == KIND_FP32:
            weights[k] = single[k]
        else:
            weights[k] = widen(brain[k]) if kind == KIND_BF16 else widen(half[k])
    return weights


@kernel
def take(table, kind, ids, out, rows, depth, count):
    """out[t] = table[ids[t]] as fp32; table [count, depth] of any kind, ids int64 [rows], out fp32 [rows, depth].

    Returns False, having written nothing, when an id is not in 0 .. count - 1; likewise below.
    """
    at, outputs = view1(ids, rows, I64), view2(out, rows, depth, FP32)
    if not _within(at, count):
        return False
    size = 4 if kind == KIND_FP32 else 2
    for t in range(rows):
        outputs[t] = _widened(table + at[t] * depth * size, kind, depth)
    return True


@kernel
def add(x, y, n, scale):
    """x += scale * y for n fp32."""
    left, right, factor = view1(x, n, FP32), view1(y, n, FP32), np.float32(scale)
    for k in range(n):
        left[k] += factor * right[k]


@kernel
def gated_add(x, y, gate, rows, depth):
    """x[t] += sigmoid(gate[t]) * y[t]; fp32 [rows, depth] and [rows]."""
    left, right, gates = view2(x, rows, depth, FP32), view2(y, rows, depth, FP32), view1(gate, rows, FP32)
    for t in range(rows):
        factor = _ONE / (_ONE + exp(-gates[t]))
        for k in range(depth):
            left[t, k] += factor * right[t, k]


@kernel
def scale(x, n, factor):
    """x *= factor for n fp32."""
    values, by = view1(x, n, FP32), np.float32(factor)
    for k in range(n):
        values[k] *= by


@kernel
def scale_rows(x, factors, index, rows, depth, count):
    """x[t] *= factors[index[t]]; x fp32 [rows, depth], factors fp32 [count], index int32 [rows]."""
    values, by, at = view2(x, rows, depth, FP32), view1(factors, count, FP32), view1(index, rows, I32)
    if not _within(at, count):
        return False
    for t in range(rows):
        for k in range(depth):
            values[t, k] *= by[at[t]]
    return True


@kernel
def clip(x, n, limit):
    """Bound n fp32 to -limit .. limit."""
    values, most = view1(x, n, FP32), np.float32(limit)
    for k in range(n):
        values[k] = max(-most, min(values[k], most))


@kernel
def copy(x, x_row, x_head, y, y_row, y_head, rows, heads, depth):
    """y = x for fp32 [rows, heads, depth] whose rows and heads lie so many elements apart."""
    for t in range(rows):
        for h in range(heads):
            source = view1(x + (t * x_row + h * x_head) * 4, depth, FP32)
            target = view1(y + (t * y_row + h * y_head) * 4, depth, FP32)
            for d in range(depth):
                target[d] = source[d]


@kernel
def rms_norm(x, x_row, weight, kind, eps, y, y_row, rows, depth):
    """y = x / sqrt(mean(x**2) + eps) * weight; fp32 rows so many elements apart, weight [depth] of any kind."""
    weights, squares = _widened(weight, kind, depth), np.empty(depth, np.float32)
    for t in range(rows):
        inputs, outputs = view1(x + t * x_row * 4, depth, FP32), view1(y + t * y_row * 4, depth, FP32)
        for k in range(depth):
            squares[k] = inputs[k] * inputs[k]
        factor = _ONE / np.sqrt(lane_sum(squares, depth) / np.float32(depth) + np.float32(eps))
        for k in range(depth):
            outputs[k] = inputs[k] * factor * weights[k]


@kernel
def layer_norm(x, weight, bias, kind, eps, y, rows, depth):
    """y = (x - mean) / sqrt(variance + eps) * weight + bias; fp32 [rows, depth], weight, bias [depth] of a kind."""
    inputs, outputs = view2(x, rows, depth, FP32), view2(y, rows, depth, FP32)
    weights, offsets = _widened(weight, kind, depth), _widened(bias, kind, depth)
    centred, squares = np.empty(depth, np.float32), np.empty(depth, np.float32)
    for t in range(rows):
        mean = lane_sum(inputs[t], depth) / np.float32(depth)
        for k in range(depth):
            centred[k] = inputs[t, k] - mean
            squares[k] = centred[k] * centred[k]
        factor = _ONE / np.sqrt(lane_sum(squares, depth) / np.float32(depth) + np.float32(eps))
        for k in range(depth):
            outputs[t, k] = centred[k] * factor * weights[k] + offsets[k]


@helper
def _rotate(first, second, c, s):
    for d in range(len(c)):
        a, b = first[d], second[d]
        first[d] = a * c[d] - b * s[d]
        second[d] = b * c[d] + a * s[d]


@helper
def _rotate_neighbours(values, c, s):
    for d in range(len(c)):
        a, b = values[d, 0], values[d, 1]
        values[d, 0] = a * c[d] - b * s[d]
        values[d, 1] = b * c[d] + a * s[d]


@kernel
def rope(x, x_row, x_head, cos, sin, positions, sizes, interleaved):
    """Rotate pairs (d, d + half), or (2 d, 2 d + 1), of fp32 x [rows, heads, ..] whose rows and heads lie so many
    elements apart; sizes: rows, heads, half, count; cos, sin [count, half]; positions int32 [rows].
    """
    rows, heads, half, count = sizes
    at = view1(positions, rows, I32)
    if not _within(at, count):
        return False
    for t in range(rows):
        c = view1(cos + at[t] * half * 4, half, FP32)
        s = view1(sin + at[t] * half * 4, half, FP32)
        for h in range(heads):
            start = x + (t * x_row + h * x_head) * 4
            if interleaved:
                _rotate_neighbours(view2(start, half, 2, FP32), c, s)
            else:
                _rotate(view1(start, half, FP32), view1(start + half * 4, half, FP32), c, s)
    return True


@kernel
def store_rows(cache, rows, slots, count, depth, room):
    """cache[slots[t]] = rows[t]; cache fp32 [room, depth], rows fp32 [count, depth], slots int64 [count]."""
    source, at = view2(rows, count, depth, FP32), view1(slots, count, I64)
    if not _within(at, room):
        return False
    for t in range(count):
        target = view1(cache + at[t] * depth * 4, depth, FP32)
        for k in range(depth):
            target[k] = source[t, k]
    return True


@kernel
def combine(out, parts, source, index, weights, rows, k, depth):
    """out[t] += sum over j of weights[t, j] * part source[t, j]'s row index[t, j].

    parts: int64 array [.., 2] of address and number of fp32 rows; the others are addresses.
    """
    factors = view2(weights, rows, k, FP32)
    sources, indices = view2(source, rows, k, I32), view2(index, rows, k, I32)
    if not _within(sources.ravel(), len(parts)):
        return False
    for t in range(rows):
        for j in range(k):
            if indices[t, j] < 0 or indices[t, j] >= parts[sources[t, j], 1]:
                return False
    add_parts(view2(out, rows, depth, FP32), parts, sources, indices, factors)
    return True


@helper
def add_parts(target, parts, sources, indices, factors):
    """``combine`` on arrays whose numbers are known to be right."""
    (rows, k), depth = sources.shape, target.shape[1]
    total = np.empty(depth, np.float32)
    for t in range(rows):
        total[:] = 0
        for j in range(k):
            row = view1(parts[sources[t, j], 0] + indices[t, j] * depth * 4, depth, FP32)
            for d in range(depth):
                total[d] += factors[t, j] * row[d]
        for d in range(depth):
            target[t, d] += total[d]
