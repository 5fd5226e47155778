"""Which rows the next step computes: admission, continuous batching, chunked prefill, preemption.

Pure policy over sequences and the block pool; no clocks, threads or tensors. First come, first served: every running
sequence is older than every waiting one, and the oldest can always push out the others, so that nobody starves.
"""

from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np

from services.attention.kv_cache import BlockPool, blocks_for
from services.attention.sequence import TOKEN_BYTES, Sequence
from shared.request_messages import Decision, Submit


@dataclass(frozen=True)
class Limits:
    max_model_len: int
    """Tokens."""
    max_num_seqs: int
    """Most sequences in one step; not more than ``max_batched_tokens``."""
    max_batched_tokens: int
    """Most rows in one step."""
    max_waiting: int
    """Longest queue, in requests."""
    vocab_size: int
    kv_blocks: int
    block_size: int
    """Tokens per block."""
    mixed_prefill: int = 80
    """Most rows of prompts in a step in which more sequences generate than wait for their first token."""


@dataclass(frozen=True, slots=True)
class Chunk:
    """Rows ``start`` to ``start + count`` of one sequence in a step."""

    sequence: Sequence
    start: int
    count: int

    @property
    def first(self) -> bool:
        """Nothing of the sequence was computed before, in this turn of its life."""
        return self.start == self.sequence.reused

    @property
    def complete(self) -> bool:
        """The cache has the whole sequence after this chunk: the next token can be chosen."""
        return self.start + self.count == self.sequence.length


def prefills(chunks: Iterable[Chunk]) -> bool:
    """Whether a step computes prompts: more rows of some sequence than the one that its next token needs."""
    return any(chunk.count > 1 for chunk in chunks)


def refusal(request: Submit, limits: Limits) -> Decision | None:
    """Why a request can never succeed on this instance, or None."""
    if not request.prompt or len(request.prompt) % 4 or len(request.output) % 4:
        return Decision(ok=False, code="invalid", message="prompt and output must be int32 token ids, prompt not empty")
    tokens = np.frombuffer(request.prompt + request.output, TOKEN_BYTES)
    if tokens.min() < 0 or tokens.max() >= limits.vocab_size:
        return Decision(ok=False, code="invalid", message=f"token ids must be 0 to {limits.vocab_size - 1}")
    if any(not 0 <= token < limits.vocab_size for token in request.sampling.logit_bias):
        return Decision(ok=False, code="invalid", message=f"logit_bias ids must be 0 to {limits.vocab_size - 1}")
    return _too_long(len(request.prompt) // 4, request.sampling.max_tokens, limits)


def _too_long(prompt: int, max_tokens: int, limits: Limits) -> Decision | None:
    wanted = f"{prompt} prompt tokens and max_tokens {max_tokens}"
    if prompt + max_tokens > limits.max_model_len:
        message = f"{wanted}: more than the context of {limits.max_model_len} tokens"
        return Decision(ok=False, code="too_long", message=message)
    slots = prompt + max(max_tokens - 1, 0)  # the last token's K and V are never read
    if blocks_for(slots, limits.block_size) > limits.kv_blocks:
        message = f"{wanted}: more than the KV cache of {limits.kv_blocks * limits.block_size} tokens"
        return Decision(ok=False, code="too_long", message=message)
    return None


class Batcher:
    """The queue, the running set and what they do next."""

    def __init__(self, limits: Limits, pool: BlockPool) -> None:
        self.limits = limits
        self.pool = pool
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []
        """Oldest first."""
        self.preemptions = 0
        self.reused = 0
        """Tokens found in the prefix cache instead of computed."""
        self._refused: tuple[Sequence | None, int, int] = (None, 0, 0)

    def __iter__(self) -> Iterator[Sequence]:
        yield from self.running
        yield from self.waiting

    def add(self, sequence: Sequence) -> None:
        self.waiting.append(sequence)

    def remove(self, sequence: Sequence) -> None:
        """Take a sequence out, whatever its state; its blocks are free afterwards."""
        sequence.forget_cache()
        if sequence in self.running:
            self.running.remove(sequence)
        elif sequence in self.waiting:
            self.waiting.remove(sequence)

    def next_step(self) -> list[Chunk]:
        """Rows by age, then newcomers, within the limits. Empty: nothing to do.

        Decodes come before prefill chunks that way: a prompt that is not complete used up its step, so that nobody
        younger runs yet. What was asked for and not computed is asked for again.
        """
        preempted = self._make_room()
        chunks: list[Chunk] = []
        budget = self.limits.max_batched_tokens
        prompts = self._prompt_rows()
        for sequence in self.running:
            generating = sequence.pending == 1
            count = self._schedule(sequence, budget if generating else min(budget, prompts), chunks)
            budget -= count
            prompts -= 0 if generating else count
        while min(budget, prompts) and not preempted and self._admit():
            count = self._schedule(self.running[-1], min(budget, prompts), chunks)
            budget, prompts = budget - count, prompts - count
        return chunks

    def _prompt_rows(self) -> int:
        """Rows of prompts that a step may have: few while that would keep more sequences waiting than it serves."""
        generating = sum(sequence.pending == 1 for sequence in self.running)
        if 2 * generating > len(self.running) + len(self.waiting):
            return self.limits.mixed_prefill
        return self.limits.max_batched_tokens

    def _schedule(self, sequence: Sequence, budget: int, chunks: list[Chunk]) -> int:
        count = min(sequence.pending, budget)
        if count:
            chunks.append(Chunk(sequence, sequence.computed, count))
        return count

    def _make_room(self) -> bool:
        """Slots for every running sequence's pending tokens, the youngest giving way. True if any had to."""
        before = self.preemptions
        index = 0
        while index < len(self.running):
            if self.running[index].table.grow_to(self.running[index].length):
                index += 1
            else:
                self._preempt()
        return self.preemptions > before

    def _preempt(self) -> None:
        youngest = self.running.pop()
        youngest.forget_cache()
        self.waiting.appendleft(youngest)
        self.preemptions += 1

    def _admit(self) -> bool:
        """Start the head of the queue if all it has so far fits, with a block to spare for everyone who runs.

        The spare blocks keep a newcomer from being pushed out again after a step or two.
        """
        if not self.waiting or len(self.running) >= self.limits.max_num_seqs:
            return False
        head = self.waiting[0]
        before, free, running = self._refused
        if head is before and self.pool.free <= free and len(self.running) >= running:
            return False  # nothing has changed for the better
        head.begin(self.pool)
        needed = blocks_for(head.length, self.limits.block_size) - len(head.table.ids)
        if needed + len(self.running) > self.pool.free or not head.table.grow_to(head.length):
            head.forget_cache()
            self._refused = head, self.pool.free, len(self.running)
            return False
        self.reused += head.reused
        self.running.append(self.waiting.popleft())
        return True
