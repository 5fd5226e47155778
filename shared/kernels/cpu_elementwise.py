"""Kernels on CPU that treat rows one by one: norm, rotation, cache writes, gate scores, combine.

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
    arguments,
    float_of,
    helper,
    kernel,
    view1,
    view2,
    view3,
)
from shared.kernels.tiles import bits_of, from_bits, lane_max, lane_sum, widen

SILU, GELU, GELU_TANH = 0, 1, 2
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
def add(x, y, n):
    """x += y for n fp32."""
    left, right = view1(x, n, FP32), view1(y, n, FP32)
    for k in range(n):
        left[k] += right[k]
    return True


@kernel
def rms_norm(x, weight, kind, eps, y, rows, depth):
    """y = x / sqrt(mean(x**2) + eps) * weight; x and y fp32 [rows, depth], weight [depth] of any kind."""
    inputs, outputs = view2(x, rows, depth, FP32), view2(y, rows, depth, FP32)
    weights, squares = _widened(weight, kind, depth), np.empty(depth, np.float32)
    for t in range(rows):
        for k in range(depth):
            squares[k] = inputs[t, k] * inputs[t, k]
        factor = _ONE / np.sqrt(lane_sum(squares, depth) / np.float32(depth) + np.float32(eps))
        for k in range(depth):
            outputs[t, k] = inputs[t, k] * factor * weights[k]
    return True


@kernel
def rope(x, cos, sin, positions, rows, heads, depth, half, count):
    """Rotate pairs (d, d + half) of x [rows, heads, depth]; cos, sin [count, half]; positions int32 [rows]."""
    values, at = view3(x, rows, heads, depth, FP32), view1(positions, rows, I32)
    if not _within(at, count):
        return False
    for t in range(rows):
        c = view1(cos + at[t] * half * 4, half, FP32)
        s = view1(sin + at[t] * half * 4, half, FP32)
        for h in range(heads):
            for d in range(half):
                a, b = values[t, h, d], values[t, h, d + half]
                values[t, h, d] = a * c[d] - b * s[d]
                values[t, h, d + half] = b * c[d] + a * s[d]
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
def choose(logits, weights, ids, rows, experts, top_k, normalise):
    """Softmax over fp32 logits [rows, experts] (destroyed), then the top_k largest, ties to the lowest id."""
    scores = view2(logits, rows, experts, FP32)
    chosen, numbers = view2(weights, rows, top_k, FP32), view2(ids, rows, top_k, I32)
    for t in range(rows):
        row = scores[t]
        total = softmax(row, experts, _ONE)
        for e in range(experts):
            row[e] /= total
        kept = np.float32(0)
        for j in range(top_k):
            best = -1
            for e in range(experts):
                if row[e] != -np.inf and (best < 0 or row[e] > row[best]):
                    best = e
            chosen[t, j], numbers[t, j] = row[best], best
            kept += row[best]
            row[best] = -np.inf
        for j in range(top_k if normalise else 0):
            chosen[t, j] /= kept


@kernel
def combine(out, parts, source, index, weights, rows, k, depth):
    """out[t] += sum over j of weights[t, j] * part source[t, j]'s row index[t, j].

    parts: int64 array [.., 2] of address and number of fp32 rows; the others are addresses.
    """
    target, factors = view2(out, rows, depth, FP32), view2(weights, rows, k, FP32)
    sources, indices = view2(source, rows, k, I32), view2(index, rows, k, I32)
    if not _within(sources.ravel(), len(parts)):
        return False
    for t in range(rows):
        for j in range(k):
            if indices[t, j] < 0 or indices[t, j] >= parts[sources[t, j], 1]:
                return False
    total = np.empty(depth, np.float32)
    for t in range(rows):
        total[:] = 0
        for j in range(k):
            row = view1(parts[sources[t, j], 0] + indices[t, j] * depth * 4, depth, FP32)
            for d in range(depth):
                total[d] += factors[t, j] * row[d]
        for d in range(depth):
            target[t, d] += total[d]
    return True


def take_operation(at):
    return np.int64(take(*arguments(at, 7)))


def add_operation(at):
    return np.int64(add(*arguments(at, 3)))


def rms_norm_operation(at):
    x, weight, kind, eps, y, rows, depth = arguments(at, 7)
    return np.int64(rms_norm(x, weight, kind, float_of(eps), y, rows, depth))


def rope_operation(at):
    return np.int64(rope(*arguments(at, 9)))


def store_rows_operation(at):
    return np.int64(store_rows(*arguments(at, 6)))
