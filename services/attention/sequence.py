"""One request inside the engine: its tokens, how far its KV cache reaches, its blocks.

Covers state only: batching.py decides when it runs, sampler.py which token comes next.
"""

from dataclasses import dataclass, field

import numpy as np

from services.attention.kv_cache import BlockPool, BlockTable, block_key
from shared.request_messages import FinishReason, SamplingParams, Submit, TokenLogprobs
from shared.telemetry import NO_TRACE

TOKEN_BYTES = "<i4"
Trace = tuple[bytes, bytes]


@dataclass(eq=False, slots=True)
class Sequence:
    """Prompt and output of one request in one array; times are monotonic seconds."""

    request_id: str
    gateway: str
    sampling: SamplingParams
    prompt: int
    """Tokens of the prompt proper; everything behind them is output."""
    tokens: np.ndarray
    """int32, room for prompt and max_tokens; the first ``length`` are valid."""
    length: int
    table: BlockTable
    arrived: float
    deadline: float
    computed: int = 0
    """Tokens whose K and V are in the cache."""
    trace: Trace = NO_TRACE
    """Trace and span id of a request that is traced."""
    resumed: int = 0
    """Output tokens that were already delivered when the request came here."""
    prompt_logprobs: list[TokenLogprobs] = field(default_factory=list)
    reused: int = 0
    """Tokens whose K and V the cache had before the sequence began to run."""
    keys: list[bytes] = field(default_factory=list)
    """Of the first blocks of ``tokens``."""
    named: int = 0
    """Blocks that the pool knows by their keys."""

    @classmethod
    def from_submit(cls, request: Submit, pool: BlockPool, now: float, trace: Trace = NO_TRACE) -> "Sequence":
        """A sequence with nothing computed. The request must have passed ``batching.refusal``."""
        prompt = np.frombuffer(request.prompt, TOKEN_BYTES)
        output = np.frombuffer(request.output, TOKEN_BYTES)
        known = len(prompt) + len(output)
        room = max(known, len(prompt) + request.sampling.max_tokens)
        tokens = np.zeros(room, dtype=np.int32)
        tokens[:known] = np.concatenate([prompt, output])
        return cls(
            request.request_id, request.gateway, request.sampling, len(prompt), tokens, known,
            BlockTable(pool, room), now, now + request.deadline_s, trace=trace, resumed=len(output),
        )  # fmt: skip

    @property
    def pending(self) -> int:
        """Tokens that are known but not yet in the cache."""
        return self.length - self.computed

    @property
    def generated(self) -> int:
        """Output tokens so far, resumed ones included: the position of the next one."""
        return self.length - self.prompt

    @property
    def outstanding(self) -> int:
        """Tokens still to be computed: what is pending, and what may yet be generated."""
        return self.pending + max(self.sampling.max_tokens - self.generated, 0)

    @property
    def wants_prompt_logprobs(self) -> bool:
        """A resumed request has delivered them before."""
        return self.sampling.prompt_logprobs >= 0 and not self.resumed

    def append(self, token: int) -> None:
        self.tokens[self.length] = token
        self.length += 1

    def begin(self, pool: BlockPool) -> None:
        """Hold what the pool has of the first blocks; at least one token is left to compute, for the logits.

        Not for prompt log-probabilities: they need every row of the prompt.
        """
        if not pool.reuse or self.wants_prompt_logprobs:
            return
        blocks = pool.find(self._first_keys((self.length - 1) // pool.block_size, pool.block_size))
        self.table.begin_with(blocks)
        self.named = len(blocks)
        self.reused = self.computed = len(blocks) * pool.block_size

    def advance(self, count: int, pool: BlockPool) -> None:
        """``count`` more tokens are in the cache; blocks that are full now can be found by others."""
        self.computed += count
        full = self.computed // pool.block_size
        if full > self.named and pool.reuse:
            keys = self._first_keys(full, pool.block_size)
            for block in range(self.named, full):
                pool.name(int(self.table.ids[block]), keys[block])
            self.named = full

    def _first_keys(self, count: int, block_size: int) -> list[bytes]:
        while len(self.keys) < count:
            start = len(self.keys) * block_size
            self.keys.append(block_key(self.keys[-1] if self.keys else b"", self.tokens[start : start + block_size]))
        return self.keys[:count]

    def forget_cache(self) -> None:
        """Hand the blocks back; what nobody has kept must be computed again."""
        self.table.release()
        self.computed = self.reused = self.named = 0

    def ended(self, max_model_len: int) -> FinishReason | None:
        """Whether the output is complete as it stands."""
        if self.generated and int(self.tokens[self.length - 1]) in self.sampling.stop_token_ids:
            return "stop"
        full = self.generated >= self.sampling.max_tokens or self.length >= max_model_len
        return "length" if full else None
