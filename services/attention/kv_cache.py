"""Who owns which KV block: a free list and one table per sequence.

Covers bookkeeping only; the tensors are ``shared.models.decoder.KvCache``. Scheme: paged attention (Kwon et al., 2023).
"""

import numpy as np


def blocks_for(tokens: int, block_size: int) -> int:
    """Blocks that hold ``tokens`` cache slots."""
    return -(-tokens // block_size)


class BlockPool:
    """All KV blocks of one instance. Handing back a block that is not out raises ValueError: it is a defect."""

    def __init__(self, blocks: int, block_size: int) -> None:
        self.blocks = blocks
        self.block_size = block_size
        self._free = np.arange(blocks - 1, -1, -1, dtype=np.int32)  # a stack; low ids are handed out first
        self._free_count = blocks
        self._out = np.zeros(blocks, dtype=bool)

    @property
    def free(self) -> int:
        return self._free_count

    @property
    def used(self) -> int:
        return self.blocks - self._free_count

    def take(self, count: int) -> np.ndarray | None:
        """``count`` block ids (int32), or None when fewer are free."""
        if count > self._free_count:
            return None
        taken = self._free[self._free_count - count : self._free_count][::-1].copy()
        self._free_count -= count
        self._out[taken] = True
        return taken

    def give_back(self, blocks: np.ndarray) -> None:
        """Return blocks (int32 [n]) that were taken before."""
        if not self._out[blocks].all() or len(np.unique(blocks)) != len(blocks):
            raise ValueError(f"blocks {blocks.tolist()} are not all out exactly once")
        self._out[blocks] = False
        self._free[self._free_count : self._free_count + len(blocks)] = blocks[::-1]
        self._free_count += len(blocks)

    def leaked(self) -> list[int]:
        """Blocks that are out; an idle instance has none."""
        return np.flatnonzero(self._out).tolist()


class BlockTable:
    """The blocks of one sequence, in order of position."""

    def __init__(self, pool: BlockPool, most_tokens: int) -> None:
        self._pool = pool
        self._ids = np.zeros(blocks_for(most_tokens, pool.block_size), dtype=np.int32)
        self._count = 0

    @property
    def ids(self) -> np.ndarray:
        """int32 [blocks held]; a view."""
        return self._ids[: self._count]

    def grow_to(self, tokens: int) -> bool:
        """Hold slots for ``tokens`` tokens. False, and nothing changed, when the pool has too few blocks."""
        missing = blocks_for(tokens, self._pool.block_size) - self._count
        if missing <= 0:
            return True
        taken = self._pool.take(missing)
        if taken is None:
            return False
        self._ids[self._count : self._count + missing] = taken
        self._count += missing
        return True

    def release(self) -> None:
        """Hand every block back; idempotent."""
        if self._count:
            self._pool.give_back(self.ids)
            self._count = 0
