"""Numba kernels behind sampler.py: one row of logits at a time, every sum in a fixed order.

A row's result depends on that row and its own parameters only, never on the number of rows: rows are spread over
threads, a row is not. Compiled at the first call (or ``Sampler.warm_up``) and cached on disk.
"""

import math

import numpy as np
from numba import njit, prange

NO_TOKEN = -1
"""The row has a NaN, an infinity on top, or nothing left to choose from."""


@njit(cache=True)
def uniform(seed: np.uint64, position: np.uint64) -> float:
    """A float in [0, 1): two rounds of splitmix64 (Steele et al., 2014), top 53 bits."""
    return np.float64(_mix(_mix(seed) ^ position) >> np.uint64(11)) * (1.0 / (1 << 53))


@njit(cache=True, inline="always")
def _mix(state: np.uint64) -> np.uint64:
    z = state + np.uint64(0x9E3779B97F4A7C15)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


@njit(cache=True, parallel=True, nogil=True)
def sample_rows(
    logits: np.ndarray,
    temperature: np.ndarray,
    top_k: np.ndarray,
    top_p: np.ndarray,
    min_p: np.ndarray,
    seeds: np.ndarray,
    positions: np.ndarray,
) -> np.ndarray:
    """One token id (int64) for each row of ``logits`` [R, vocab] fp32, NO_TOKEN where that is impossible.

    temperature > 0, top_p, min_p: float64 [R]; top_k: int64 [R], 0 = off; seeds, positions: uint64 [R].
    Order of filters: temperature, min_p, top_k, top_p; each works on what the one before has left.
    """
    tokens = np.empty(logits.shape[0], dtype=np.int64)
    for row in prange(logits.shape[0]):
        weights = np.empty(logits.shape[1], dtype=np.float64)
        if _weigh(logits[row], temperature[row], min_p[row], weights):
            point = uniform(seeds[row], positions[row])
            tokens[row] = _draw(weights, top_k[row], top_p[row], point)
        else:
            tokens[row] = NO_TOKEN
    return tokens


@njit(cache=True)
def _weigh(logits: np.ndarray, temperature: float, min_p: float, weights: np.ndarray) -> bool:
    """weights = exp((logits - max) / temperature), zero below ``min_p`` times the largest (which is 1)."""
    top = -np.inf
    for i in range(len(logits)):
        if math.isnan(logits[i]):
            return False
        top = max(top, np.float64(logits[i]))
    if math.isinf(top):
        return False
    for i in range(len(logits)):
        weight = math.exp((np.float64(logits[i]) - top) / temperature)
        weights[i] = weight if weight >= min_p else 0.0
    return True


@njit(cache=True)
def _draw(weights: np.ndarray, top_k: int, top_p: float, point: float) -> int:
    """Inverse of the cumulative weights at ``point``: by id when unfiltered, else by falling weight, then id."""
    total = 0.0
    for i in range(len(weights)):
        total += weights[i]
    if top_k <= 0 and top_p >= 1.0:
        return _walk(weights, np.arange(len(weights)), total * point)
    limit = min(top_k, len(weights)) if top_k > 0 else len(weights)
    order = _heaviest(weights, limit, top_p * total if top_k <= 0 else np.inf)[:limit]
    if top_k > 0:
        total = 0.0
        for token in order:
            total += weights[token]
    kept = 0
    mass = 0.0
    while kept < len(order) and (kept == 0 or mass < top_p * total):
        mass += float(weights[order[kept]])
        kept += 1
    return _walk(weights, order[:kept], mass * point)


@njit(cache=True)
def _heaviest(weights: np.ndarray, count: int, mass: float) -> np.ndarray:
    """Ids by falling weight (ties: lowest id), at least the first ``count`` or as many as weigh ``mass``.

    Sorting a whole vocabulary is slow, so the bar is lowered until enough ids are over it, and only those are sorted.
    """
    positive = np.count_nonzero(weights)
    bar = 0.5
    over = 0
    found = 0.0
    while over < min(count, positive) and found < mass:
        bar *= bar
        over = 0
        found = 0.0
        for i in range(len(weights)):
            if weights[i] > bar:
                over += 1
                found += weights[i]
    ids = np.flatnonzero(weights > bar)
    return ids[np.argsort(-weights[ids], kind="mergesort")]


@njit(cache=True)
def _walk(weights: np.ndarray, order: np.ndarray, target: float) -> int:
    """First id in ``order`` at which the running sum passes ``target``; the last one with weight if none does."""
    running = 0.0
    last = NO_TOKEN
    for token in order:
        if weights[token] > 0.0:
            running += weights[token]
            last = token
            if running > target:
                break
    return last


@njit(cache=True, parallel=True, nogil=True)
def logprob_rows(
    logits: np.ndarray, tokens: np.ndarray, count: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Log-softmax of ``logits`` [R, vocab] fp32 at ``tokens`` (int64 [R]) and at the ``count`` most probable ids.

    Returns logprob float64 [R] (NaN when the row has one), rank int64 [R] (1 = most probable), top ids int64
    [R, count] and top logprobs float64 [R, count]. Ties: the lowest id comes first.
    """
    rows = logits.shape[0]
    logprob = np.empty(rows, dtype=np.float64)
    rank = np.empty(rows, dtype=np.int64)
    top_ids = np.full((rows, count), -1, dtype=np.int64)
    top = np.full((rows, count), -np.inf, dtype=np.float64)
    for row in prange(rows):
        normaliser = _log_sum_exp(logits[row])
        logprob[row] = np.float64(logits[row, tokens[row]]) - normaliser
        rank[row] = _rank(logits[row], tokens[row])
        _select(logits[row], top_ids[row], top[row])
        for j in range(count):
            top[row, j] -= normaliser
    return logprob, rank, top_ids, top


@njit(cache=True)
def _log_sum_exp(logits: np.ndarray) -> float:
    top = np.float64(logits[0])
    for i in range(len(logits)):
        if math.isnan(logits[i]):
            return np.nan
        top = max(top, np.float64(logits[i]))
    total = 0.0
    for i in range(len(logits)):
        total += math.exp(np.float64(logits[i]) - top)
    return top + math.log(total)


@njit(cache=True)
def _rank(logits: np.ndarray, token: int) -> int:
    before = 0
    for i in range(len(logits)):
        if logits[i] > logits[token] or (logits[i] == logits[token] and i < token):
            before += 1
    return before + 1


@njit(cache=True)
def _select(logits: np.ndarray, ids: np.ndarray, values: np.ndarray) -> None:
    """The largest logits in falling order by insertion; a later equal one goes behind."""
    count = len(ids)
    for i in range(len(logits) if count else 0):
        value = np.float64(logits[i])
        if ids[count - 1] >= 0 and value <= values[count - 1]:
            continue
        j = count - 1
        while j > 0 and (ids[j - 1] < 0 or value > values[j - 1]):
            ids[j] = ids[j - 1]
            values[j] = values[j - 1]
            j -= 1
        ids[j] = i
        values[j] = value
