"""Requests through one system, step by step, compiled: continuous batching with chunks of prompts.

Rows are spread evenly over the instances of a pool, so that a system is its batch. A step takes the time of the table
of the plan that is in use when it begins.
"""
# ruff: noqa: ANN001, ANN201, ANN202 - numba infers the types

import numpy as np
from numba import njit

NOBODY = -1


@njit(cache=True, nogil=True)
def serve(times, prompts, outputs, starts, plans, batches, chunks, tables, rooms, ends):
    """When every request gets its first and its last token; NaN: not before the end.

    Args:
        times, prompts, outputs: [requests], seconds and tokens.
        starts: [changes], when the plan of ``plans`` [changes] is put to use; the first is 0.
        batches, chunks: grids [B], [P] of sequences and of rows of prompts; ``tables`` [plans, B, P], seconds.
        rooms: [plans, 2], most sequences, and most rows of prompts in a step.
        ends: seconds.

    Returns:
        first, last: [requests]; steps; sum over steps of seconds x batch.
    """
    count = len(times)
    first, last = np.full(count, np.nan), np.full(count, np.nan)
    ring = outputs.max() + 1 if count else 1
    heads, following = np.full(ring, NOBODY, np.int64), np.full(count, NOBODY, np.int64)
    left = prompts.copy()
    now, step, change, active, filling, waiting = 0.0, 0, 0, 0, 0, 0
    area = 0.0
    # Requests 0..filling-1 have their prompts done, filling..waiting-1 are admitted to the queue, others are to come.
    while now < ends:
        while waiting < count and times[waiting] <= now:
            waiting += 1
        if active == 0 and filling == waiting:
            if waiting == count:
                break
            now = times[waiting]
            continue
        while change + 1 < len(starts) and starts[change + 1] <= now:
            change += 1
        plan = plans[change]
        begun = filling
        rows = _fill(left, filling, waiting, active, rooms[plan])
        while filling < waiting and left[filling] == 0:
            filling += 1
        seconds = _look(tables[plan], batches, chunks, max(1.0, active), rows)
        now += seconds
        area += seconds * active
        step += 1
        active -= _end(heads, following, last, step % ring, now)
        for r in range(begun, filling):
            first[r] = now
            if outputs[r] == 1:
                last[r] = now
            else:
                at = (step + outputs[r] - 1) % ring
                following[r], heads[at] = heads[at], r
                active += 1
    return first, last, step, area


@njit(cache=True, nogil=True)
def _fill(left, filling, waiting, active, room):
    """Compute prompts in the order of arrival, as far as rows and cache allow; returns the rows."""
    rows, r = 0, filling
    while r < waiting and rows < room[1] and active + (r - filling) < room[0]:
        taken = min(left[r], int(room[1]) - rows)
        left[r] -= taken
        rows += taken
        if left[r] == 0:
            r += 1
    return rows


@njit(cache=True, nogil=True)
def _end(heads, following, last, at, now):
    """Those whose last token this step has made; returns how many."""
    ended, r = 0, heads[at]
    while r != NOBODY:
        last[r] = now
        ended += 1
        r = following[r]
    heads[at] = NOBODY
    return ended


@njit(cache=True, nogil=True)
def _look(table, batches, chunks, batch, rows):
    """Between four entries, linear in both."""
    i = min(max(np.searchsorted(batches, batch), 1), len(batches) - 1)
    j = min(max(np.searchsorted(chunks, rows), 1), len(chunks) - 1)
    x = min(1.0, (batch - batches[i - 1]) / (batches[i] - batches[i - 1]))
    y = min(1.0, (rows - chunks[j - 1]) / (chunks[j] - chunks[j - 1]))
    low = table[i - 1, j - 1] * (1 - y) + table[i - 1, j] * y
    return low * (1 - x) + (table[i, j - 1] * (1 - y) + table[i, j] * y) * x
