"""A toy decoder and exchange around the real engine: integer arithmetic, one hidden column, driven turn by turn.

Each token's logits depend on every token before it *through the paged cache*, so that a wrong slot, a stale block or a
skipped recomputation changes the output.
"""

from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

from services.attention.batching import Batcher, Limits
from services.attention.engine import Engine
from services.attention.kv_cache import BlockPool
from services.attention.micro_batches import MicroBatching
from services.attention.phases import ignore
from services.attention.step import ModelRunner
from shared.errors import ExchangeUnavailable
from shared.kernels.reference import ReferenceKernels
from shared.models.decoder import KvCache
from shared.pace import UNPACED, Pace
from shared.request_messages import SamplingParams, Submit, TokenDelta

VOCAB = 50
PRIME = 1_000_003
LAYERS = (SimpleNamespace(index=0, moe=True), SimpleNamespace(index=1, moe=False), SimpleNamespace(index=2, moe=True))


class ToyDecoder:
    device = torch.device("cpu")
    kernels = ReferenceKernels()
    spec = SimpleNamespace(layers=LAYERS)

    def __init__(self, block_size, poison=()):
        self.block_size = block_size
        self.poison = set(poison)
        """Tokens after which the logits are NaN."""

    def new_cache(self, blocks):
        return KvCache([torch.full((blocks * self.block_size,), -1) for _ in LAYERS], [])

    def new_rows(self, count):
        return torch.empty(count, 1, dtype=torch.int64)

    def embed(self, step, out):
        out.copy_((step.tokens * 7 + 1).unsqueeze(1))

    def attend(self, layer, x, step, cache, out):
        cache.k[layer][step.slots] = x[:, 0]
        seen = torch.arange(int(step.positions.max()) + 1)
        blocks = step.tables[step.sequence.long()].long()[:, seen // self.block_size]
        past = cache.k[layer][blocks * self.block_size + seen % self.block_size]
        past = past * (seen * 31 + 7) * (seen <= step.positions[:, None])
        x.copy_((x + past.sum(dim=1, keepdim=True)) % PRIME)
        out.copy_(x)

    def shared(self, layer, rows, x):
        """None here."""

    def dense(self, layer, rows, x):
        x.copy_((x + rows * 3) % PRIME)

    def logits(self, x, step):
        rows = x.index_select(0, step.logit_rows)
        logits = ((rows * 7919 + torch.arange(VOCAB) * 104729) % 997).float() / 100
        for token in self.poison:
            logits[step.tokens[step.logit_rows] == token] = torch.nan
        return logits


class ToyExchange:
    address = b""

    def ways(self):
        return ()

    def begin(self, rows, prefill):
        return False

    def end(self):
        pass

    def __init__(self):
        self.failures = 0
        """How many dispatches from now on fail (at the last MoE layer: the cache has been written by then)."""
        self.available = True
        self.views = []
        self.abandoned = 0

    def update(self, view):
        self.views.append(view)

    def ready(self):
        return self.available

    def dispatch(self, layer, rows, trace):
        if layer == LAYERS[-1].index and (self.failures or not self.available):
            self.failures = max(self.failures - 1, 0)
            raise ExchangeUnavailable(layer, ["e0"])
        return rows.clone()

    def combine(self, handle, x):
        x.copy_((x + handle * 5 + 11) % PRIME)

    def abandon(self):
        self.abandoned += 1

    def idle_wait(self, timeout):
        pass

    def wake(self):
        pass


@dataclass
class Received:
    """What a gateway would know of one request after putting its deltas in order."""

    tokens: list[int] = field(default_factory=list)
    logprobs: list = field(default_factory=list)
    prompt_logprobs: list = field(default_factory=list)
    finish: str | None = None
    stop_token: int | None = None
    error: Any = None
    finishes: int = 0

    def take(self, delta: TokenDelta, first: int):
        skip = first + len(self.tokens) - delta.position
        assert skip >= 0, "a gap"
        self.tokens += delta.tokens[skip:]
        self.logprobs += delta.logprobs[skip:]
        self.prompt_logprobs += delta.prompt_logprobs[len(self.prompt_logprobs) :]
        if delta.finish:
            self.finish, self.stop_token, self.error = delta.finish, delta.stop_token, delta.error
            self.finishes += 1


class RecordingAwake:
    """Knows whether cores are held, and what was done since."""

    def __init__(self):
        self.held = False
        self.history: list[bool] = []

    def hold(self):
        self._set(True)

    def release(self):
        self._set(False)

    def close(self):
        self._set(False)

    def _set(self, held):
        if held != self.held:
            self.history.append(held)
        self.held = held


class ToyEngine:
    """The real engine with toy parts, a clock that is set by hand and a gateway that remembers."""

    def __init__(
        self,
        poison=(),
        no_home_deadline=30.0,
        emit: Any = None,
        record: Any = ignore,
        micro_batches=1,
        pace: Pace = UNPACED,
        **limits,
    ):
        defaults: dict[str, Any] = {
            "max_model_len": 200, "max_num_seqs": 8, "max_batched_tokens": 16, "max_waiting": 1000,
            "vocab_size": VOCAB, "kv_blocks": 100, "block_size": 4,
        }  # fmt: skip
        self.limits = Limits(**{**defaults, **limits})
        self.now = 1000.0
        self.awake = RecordingAwake()
        self.exchange: Any = ToyExchange()
        self.pool = BlockPool(self.limits.kv_blocks, self.limits.block_size)
        self.batcher = Batcher(self.limits, self.pool)
        decoder: Any = ToyDecoder(self.limits.block_size, poison)
        cache = decoder.new_cache(self.limits.kv_blocks)
        runner = ModelRunner(
            decoder, cache, self.exchange, self.limits.block_size, False, MicroBatching(micro_batches), pace
        )
        self.engine = Engine(
            runner, self.exchange, self.batcher, emit or self._emit, no_home_deadline, lambda: self.now, record,
            self.awake,
        )  # fmt: skip
        self.received: dict[str, Received] = {}
        self.first: dict[str, int] = {}
        self.sent: list[tuple[str, TokenDelta]] = []
        self.engine.turn()

    def _emit(self, gateway, deltas):
        for delta in deltas:
            self.sent.append((gateway, delta))
            self.received[delta.request_id].take(delta, self.first[delta.request_id])

    def submit(self, request_id, prompt, output=(), gateway="g", deadline_s=100.0, **sampling: Any):
        self.received.setdefault(request_id, Received())
        self.first.setdefault(request_id, len(output))
        params = SamplingParams(**{"max_tokens": 8, "temperature": 0, **sampling})
        return self.engine.submit(
            Submit(
                request_id=request_id, gateway=gateway, prompt=int32(prompt), output=int32(output), sampling=params,
                deadline_s=deadline_s,
            )
        )  # fmt: skip

    def turns(self, most=10_000):
        """Turn until nothing is computed any more; returns how many turns computed something."""
        for count in range(most):
            if not self.engine.turn():
                return count
        raise AssertionError(f"still busy after {most} turns")

    def run(self, request_id, prompt, output=(), **sampling: Any):
        decision = self.submit(request_id, prompt, output, **sampling)
        assert decision.ok, decision
        self.turns()
        return self.received[request_id]


def int32(tokens) -> bytes:
    return np.array(tokens, dtype="<i4").tobytes()


def alone(prompt, output=(), **sampling: Any) -> Received:
    """The request by itself in a roomy engine."""
    return ToyEngine(max_batched_tokens=1000).run("alone", prompt, output, **sampling)
