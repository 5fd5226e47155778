"""Attention over the paged cache in plain torch, whole batches at a time, without a look at values on the host.

What is computed follows from shapes alone, so that it can be captured in a CUDA graph. The price: as many positions are
gathered and scored as the block tables have room for, and what is hidden is masked. ``reference`` is the yardstick.
"""

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from shared.kernels.base import Paged, Visibility
from shared.kernels.reference import hidden_positions

MOST_GATHERED = 1 << 15
"""Cache positions, of all sequences together, that are copied as fp32 at a time; bounds the memory."""
MOST_SCORES = 1 << 20
"""Scores per head at a time."""


def by_shape(at: Paged) -> bool:
    """Whether ``mix`` knows all it needs from shapes: one sequence, or (as in decode) as many as rows."""
    return len(at.tables) in (1, len(at.positions))


def groups(at: Paged) -> Iterator[tuple[Tensor, Paged]]:
    """Rows of a mixed batch (int64 index on the device) in groups that ``mix`` takes. Copies ``sequence`` to the host.

    Rows that are alone in their sequence form one group, the rows of every other sequence a group each.
    """
    numbers, device = at.sequence.numpy(force=True), at.sequence.device
    counts = np.bincount(numbers)
    alone = np.flatnonzero(counts[numbers] == 1)
    if len(alone):
        rows = torch.from_numpy(alone).to(device)
        tables = at.tables[at.sequence[rows].long()]
        yield rows, Paged(tables, torch.arange(len(alone), device=device), at.positions[rows])
    for sequence in np.flatnonzero(counts > 1).tolist():
        rows = torch.from_numpy(np.flatnonzero(numbers == sequence)).to(device)
        yield rows, Paged(at.tables[sequence : sequence + 1], torch.zeros_like(rows), at.positions[rows])


def mix(q: Tensor, caches: tuple[Tensor, Tensor], at: Paged, sees: Visibility) -> Tensor:
    """q [T, heads, D] -> fp32 [T, heads, V], for what ``by_shape`` takes."""
    length, positions = at.tables.shape[1] * caches[0].shape[1], at.positions.long()
    if len(at.tables) == 1:
        step, tables = max(1, MOST_SCORES // length), at.tables.long()
        pieces = [
            _mix(rows[None], caches, tables, at_rows[None], sees)[0]
            for rows, at_rows in zip(q.split(step), positions.split(step), strict=True)
        ]
    else:
        step, tables = max(1, MOST_GATHERED // length), at.tables[at.sequence.long()].long()
        pieces = [
            _mix(rows[:, None], caches, table, at_rows[:, None], sees)[:, 0]
            for rows, table, at_rows in zip(q.split(step), tables.split(step), positions.split(step), strict=True)
        ]
    return torch.cat(pieces)


def _mix(q: Tensor, caches: tuple[Tensor, Tensor], tables: Tensor, positions: Tensor, sees: Visibility) -> Tensor:
    """B sequences of R rows: q [B, R, heads, D], int64 tables [B, blocks] and positions [B, R] -> [B, R, heads, V]."""
    size, kv_heads = caches[0].shape[1:3]
    every = torch.arange(tables.shape[1] * size, device=q.device)
    # What lies behind the last row is not read: it may hold NaN, which no mask multiplies away.
    cells = torch.minimum(every, positions.amax(1, keepdim=True))
    slots = tables.gather(1, cells // size) * size + cells % size
    k, v = (cache.flatten(0, 1)[slots].float() for cache in caches)
    scores = torch.einsum("brkgd,blkd->brkgl", q.float().unflatten(2, (kv_heads, -1)), k) * sees.scale
    hidden = hidden_positions(every, positions[..., None], sees)
    scores = scores.masked_fill(hidden[:, :, None, None], float("-inf"))
    if sees.sinks is not None:
        sinks = sees.sinks.float().view(kv_heads, -1, 1).expand(*scores.shape[:-1], 1)
        scores = torch.cat([scores, sinks], dim=-1)
    weights = scores.softmax(-1)[..., : len(every)]
    return torch.einsum("brkgl,blkd->brkgd", weights, v).flatten(2, 3)
