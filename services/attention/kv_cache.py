"""Who owns which KV block: one table per sequence, and a pool that keeps full blocks for those who begin alike.

Covers bookkeeping only; the tensors are ``shared.models.decoder.KvCache``. Scheme: paged attention (Kwon et al., 2023).
The prefix cache: a full block has a key, the hash of all tokens up to its end. When nobody holds it any more it stays
findable until its place is needed; those that were let go first, and later blocks of a sequence before earlier ones,
make room first. What is in a block depends on those tokens alone, so that finding it changes no bit of any output.
"""

from collections import OrderedDict
from collections.abc import Sequence as Several
from hashlib import blake2b

import numpy as np

KEY_BYTES = 16


def blocks_for(tokens: int, block_size: int) -> int:
    """Blocks that hold ``tokens`` cache slots."""
    return -(-tokens // block_size)


def block_key(before: bytes, tokens: np.ndarray) -> bytes:
    """The key of a block with these tokens (int32) behind a block with the key ``before`` (b"": it is the first)."""
    return blake2b(before + tokens.tobytes(), digest_size=KEY_BYTES).digest()


class BlockPool:
    """All KV blocks of one instance. Handing back a block that is not out raises ValueError: it is a defect.

    Args:
        reuse: keep full blocks findable by their key.
    """

    def __init__(self, blocks: int, block_size: int, reuse: bool = True) -> None:
        self.blocks = blocks
        self.block_size = block_size
        self.reuse = reuse
        self._free = np.arange(blocks - 1, -1, -1, dtype=np.int32)  # a stack; low ids are handed out first
        self._free_count = blocks
        self._holders = np.zeros(blocks, dtype=np.int32)
        self._by_key: dict[bytes, int] = {}
        self._keys: dict[int, bytes] = {}
        self._kept: OrderedDict[int, None] = OrderedDict()  # held by nobody but findable; the first goes first

    @property
    def free(self) -> int:
        """Blocks that can be taken, kept ones included."""
        return self._free_count + len(self._kept)

    @property
    def used(self) -> int:
        return self.blocks - self.free

    def take(self, count: int) -> np.ndarray | None:
        """``count`` block ids (int32) for one holder, or None when fewer are free."""
        if count > self.free:
            return None
        fresh = min(count, self._free_count)
        taken = np.empty(count, np.int32)
        taken[:fresh] = self._free[self._free_count - fresh : self._free_count][::-1]
        taken[fresh:] = [self._forget_oldest() for _ in range(count - fresh)]
        self._free_count -= fresh
        self._holders[taken] = 1
        return taken

    def give_back(self, blocks: np.ndarray) -> None:
        """Return one holder's blocks (int32 [n], in order of position)."""
        if not self._holders[blocks].all() or len(np.unique(blocks)) != len(blocks):
            raise ValueError(f"blocks {blocks.tolist()} are not all out exactly once")
        self._holders[blocks] -= 1
        for block in blocks[self._holders[blocks] == 0][::-1].tolist():
            if block in self._keys:
                self._kept[block] = None
            else:
                self._free[self._free_count] = block
                self._free_count += 1

    def name(self, block: int, key: bytes) -> None:
        """A block that is out is full from now on: its key can be found. The first of two with one key is found."""
        if self.reuse and key not in self._by_key:
            self._by_key[key], self._keys[block] = block, key

    def find(self, keys: Several[bytes]) -> np.ndarray:
        """Blocks (int32) with the first of ``keys``, as far as they are known; the caller holds them from now on."""
        found: list[int] = []
        for key in keys:
            block = self._by_key.get(key)
            if block is None:
                break
            found.append(block)
            self._kept.pop(block, None)
        blocks = np.array(found, np.int32)
        self._holders[blocks] += 1
        return blocks

    def forget(self, blocks: np.ndarray) -> None:
        """Blocks (int32) that are out are not to be found any more."""
        for block in blocks.tolist():
            if block in self._keys:
                del self._by_key[self._keys.pop(block)]

    def leaked(self) -> list[int]:
        """Blocks that are out; an idle instance has none."""
        return np.flatnonzero(self._holders).tolist()

    def _forget_oldest(self) -> int:
        block, _ = self._kept.popitem(last=False)
        del self._by_key[self._keys.pop(block)]
        return block


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

    def begin_with(self, blocks: np.ndarray) -> None:
        """Hold blocks (int32) that the pool has found; the table must be empty."""
        self._ids[: len(blocks)] = blocks
        self._count = len(blocks)

    def release(self) -> None:
        """Hand every block back; idempotent."""
        if self._count:
            self._pool.give_back(self.ids)
            self._count = 0
