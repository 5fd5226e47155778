"""How scores become experts and weights on CPU: every score of ``RouterSpec``, row by row."""
# ruff: noqa: ANN001, ANN201, ANN202 - numba infers the types

import numpy as np

from shared.kernels.cpu_elementwise import exp, softmax
from shared.kernels.jit import FP32, I32, helper, kernel, view1, view2

SCORES = {"softmax": 0, "sigmoid": 1, "top_softmax": 2, "top_sigmoid": 3, "sparsemixer": 4}
_SOFTMAX, _SIGMOID, _TOP_SOFTMAX, _TOP_SIGMOID, _SPARSEMIXER = SCORES.values()
_ONE, _TWO = np.float32(1), np.float32(2)


@helper
def _best(scores, barred):
    """The largest of those that are not barred, ties to the lowest; the first of them if none is a number."""
    best = -1
    for e in range(len(scores)):
        if not barred[e] and (best < 0 or scores[e] > scores[best]):
            best = e
    return best


@helper
def _worth(scores, top2):
    """A group's best score, or the sum of its two best."""
    first = second = np.float32(-np.inf)
    for score in scores:
        if score > first:
            first, second = score, first
        elif score > second:
            second = score
    return first + second if top2 else first


@helper
def _bar_groups(scores, barred, groups, kept, top2):
    """Bar the experts of all groups but the best ``kept``."""
    size = len(scores) // groups
    worth, closed = np.empty(groups, np.float32), np.zeros(groups, np.bool_)
    for g in range(groups):
        worth[g] = _worth(scores[g * size : (g + 1) * size], top2)
    barred[:] = True
    for _ in range(kept):
        g = _best(worth, closed)
        closed[g] = True
        barred[g * size : (g + 1) * size] = False


@helper
def _score(row, score):
    """Raw scores to what weights are made of, in place."""
    if score == _SOFTMAX:
        total = softmax(row, len(row), _ONE)
        for e in range(len(row)):
            row[e] /= total
    elif score == _SIGMOID:
        for e in range(len(row)):
            row[e] = _ONE / (_ONE + exp(-row[e]))


@helper
def _sparsemix(row, barred, share, jitter):
    """GRIN's choice among those that are not barred: (the best, its share of the softmax over those near to it)."""
    best = _best(row, barred)
    top = row[best]
    for e in range(len(row)):
        far = (top - row[e]) / max(abs(row[e]), top) > _TWO * jitter
        share[e] = np.float32(-np.inf) if far or barred[e] else row[e]
    total = softmax(share, len(row), _ONE)
    return best, share[best] / total


@helper
def _finish(chosen, score, normalise, scale):
    """Weights of the chosen experts out of their scores, in place."""
    if score == _TOP_SOFTMAX:
        total = softmax(chosen, len(chosen), _ONE)
        for j in range(len(chosen)):
            chosen[j] /= total
    if score == _TOP_SIGMOID:
        for j in range(len(chosen)):
            chosen[j] = _ONE / (_ONE + exp(-chosen[j]))
    total = np.float32(0)
    for j in range(len(chosen)):
        total += chosen[j]
    for j in range(len(chosen)):
        if normalise:
            chosen[j] /= total
        chosen[j] *= scale


@kernel
def choose(logits, correction, weights, ids, sizes, score, top2, normalise, scale, jitter):
    """Weights fp32 and ids int32 [rows, top_k] of raw scores fp32 [rows, experts] (destroyed).

    sizes: rows, experts, top_k, groups, groups to choose from; correction: fp32 [experts] or 0.
    """
    rows, experts, top_k, groups, kept = sizes
    scores, offsets = view2(logits, rows, experts, FP32), view1(correction, experts, FP32)
    chosen, numbers = view2(weights, rows, top_k, FP32), view2(ids, rows, top_k, I32)
    barred, by = np.empty(experts, np.bool_), np.empty(experts, np.float32)
    for t in range(rows):
        row = scores[t]
        _score(row, score)
        barred[:] = False
        for e in range(experts):
            by[e] = row[e] + offsets[e] if correction else row[e]
        if groups > 1:
            _bar_groups(by, barred, groups, kept, top2)
        for j in range(top_k):
            if score == _SPARSEMIXER:
                best, chosen[t, j] = _sparsemix(row, barred, by, np.float32(jitter))
            else:
                best = _best(by, barred)
                chosen[t, j] = row[best]
            numbers[t, j] = best
            barred[best] = True
        _finish(chosen[t], score, normalise, np.float32(scale))
