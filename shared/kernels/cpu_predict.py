"""Load prediction on CPU: a gate with a small feed-forward beside it, and what a batch of its scores says of loads.

One thread, without the interpreter: a prediction must not take a core that serves.
"""
# ruff: noqa: ANN001, ANN201, ANN202 - numba infers the types

import numpy as np

from shared.kernels.cpu_elementwise import exp
from shared.kernels.cpu_linear import new_panel, sequence
from shared.kernels.jit import call, helper, kernel

CHUNK = 64
"""Rows that are scored at a time, so that scores stay in the first-level cache."""
_ONE = np.float32(1)


@helper
def _score(project, x, rows, weights, biases, sizes, wide, scores, numbers, panel):
    """scores [rows, E] of rows at the address x; ``wide``: room for [rows, M]."""
    depth, experts, width = sizes
    gate, up, down, kind = weights
    bias, up_bias = biases
    call(project, (x, numbers, rows, gate, kind, numbers, experts, depth, panel, scores, experts))
    for t in range(rows):
        for e in range(experts):
            scores[t, e] += bias[e]
    if width == 0:
        return
    call(project, (x, numbers, rows, up, kind, numbers, width, depth, panel, wide, width))
    for t in range(rows):
        for m in range(width):
            wide[t, m] = max(wide[t, m] + up_bias[m], np.float32(0))
    part = np.empty((rows, experts), np.float32)
    call(project, (wide, numbers, rows, down, kind, numbers, experts, width, panel, part, experts))
    for t in range(rows):
        for e in range(experts):
            scores[t, e] += part[t, e]


@helper
def _correct(scores, correction):
    """What a gate chooses by that has a correction per expert: sigmoid(score) + correction, in place."""
    for t in range(len(scores)):
        for e in range(len(correction)):
            scores[t, e] = _ONE / (_ONE + exp(-scores[t, e])) + correction[e]


@helper
def _add_best(row, top_k, loads):
    """loads[e] += 1 for the ``top_k`` best of a row of scores (destroyed)."""
    for _ in range(top_k):
        best = 0
        for e in range(1, len(row)):
            if row[e] > row[best]:
                best = e
        loads[best] += _ONE
        row[best] = -np.inf


@helper
def _add_likely(row, loads):
    """loads[e] += sigmoid(score of e)."""
    for e in range(len(row)):
        loads[e] += _ONE / (_ONE + exp(-row[e]))


@kernel
def predict_scores(project, x, rows, weights, biases, correction, sizes, scores):
    """scores fp32 [rows, E] = x @ gate.T + bias + relu(x @ up.T + up_bias) @ down.T.

    Args:
        project: address of ``cpu_linear.compile_project``'s routine.
        x: address of fp32 [rows, H].
        weights: addresses of gate [E, H], up [M, H], down [E, M], and their kind.
        biases: fp32 [E], [M].
        correction: fp32 [E], or [0] for none; see ``_correct``.
        sizes: H, E, M; M = 0: a gate alone.
    """
    depth, _, width = sizes
    wide, panel = np.empty((rows, width), np.float32), new_panel(max(depth, width))
    numbers = sequence(max(rows, sizes[1], width))
    _score(project, x, rows, weights, biases, sizes, wide, scores, numbers, panel)
    _correct(scores, correction)


@kernel
def predict_loads(project, x, rows, weights, biases, correction, sizes, top_k, soft, loads):
    """loads fp32 [E], which sum to rows * top_k; arguments as in ``predict_scores``.

    ``soft``: sums of the sigmoids of scores, scaled; else each row counts for its ``top_k`` best.
    """
    depth, experts, width = sizes
    most = min(CHUNK, rows)
    scores, wide = np.empty((most, experts), np.float32), np.empty((most, width), np.float32)
    panel, numbers = new_panel(max(depth, width)), sequence(max(most, experts, width))
    loads[:] = 0
    for first in range(0, rows, CHUNK):
        count = min(CHUNK, rows - first)
        _score(project, x + first * depth * 4, count, weights, biases, sizes, wide, scores, numbers, panel)
        _correct(scores[:count], correction)
        for t in range(count):
            if soft:
                _add_likely(scores[t], loads)
            else:
                _add_best(scores[t], top_k, loads)
    if soft and rows:
        total = np.float32(0)
        for e in range(experts):
            total += loads[e]
        for e in range(experts):
            loads[e] *= np.float32(rows * top_k) / total
