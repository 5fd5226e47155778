"""The next token of each sequence, from its row of logits.

A token depends on the row, the sampling parameters, the seed, the position and the sequence's own tokens, on nothing
else: the draw is a hash of (seed, position), and no sum runs over rows. Log-probabilities are of the unmodified logits.
"""

from collections.abc import Sequence as Many
from dataclasses import dataclass

import numpy as np

from services.attention.sampling_kernels import logprob_rows, sample_rows
from services.attention.sequence import Sequence
from shared.request_messages import TokenLogprobs

GREEDY_BELOW = 1e-5
"""Temperatures below this mean: always the most probable token."""


@dataclass(frozen=True, slots=True)
class Choice:
    token: int | None
    """None: the row has a NaN or nothing to choose from."""
    logprobs: TokenLogprobs | None = None


def choose(logits: np.ndarray, sequences: Many[Sequence]) -> list[Choice]:
    """One choice for each row of ``logits`` fp32 [R, vocab]; row r belongs to ``sequences[r]``."""
    adjusted = _adjust(logits, sequences)
    greedy = np.array([s.sampling.temperature < GREEDY_BELOW for s in sequences], dtype=bool)
    tokens = np.empty(len(sequences), dtype=np.int64)
    tokens[greedy] = _most_probable(adjusted if greedy.all() else adjusted[greedy])
    drawn = np.flatnonzero(~greedy)
    if len(drawn):
        tokens[drawn] = _draw(adjusted[drawn], [sequences[r] for r in drawn.tolist()])
    return _with_logprobs(logits, tokens, sequences)


def token_logprobs(logits: np.ndarray, tokens: np.ndarray, tops: Many[int]) -> list[TokenLogprobs | None]:
    """Log-probabilities of ``tokens`` int64 [R] and the ``tops[r]`` best alternatives; None for a row with a NaN."""
    most = min(max(tops, default=0), logits.shape[1])
    values, ranks, top_ids, top = logprob_rows(logits, tokens, most)
    return [
        None
        if np.isnan(values[row])
        else TokenLogprobs(
            logprob=float(values[row]),
            rank=int(ranks[row]),
            top=tuple(zip(top_ids[row, :count].tolist(), top[row, :count].tolist(), strict=True)),
        )
        for row, count in enumerate(tops)
    ]


def warm_up() -> None:
    """Compile the kernels, or load them from the cache on disk."""
    row = np.zeros((1, 8), dtype=np.float32)
    one = np.ones(1)
    position = np.zeros(1, dtype=np.uint64)
    sample_rows(row, one, np.ones(1, dtype=np.int64), one, one, position, position)
    logprob_rows(row, np.zeros(1, dtype=np.int64), 1)


def _most_probable(logits: np.ndarray) -> np.ndarray:
    """argmax takes the first of equals, and a NaN before everything: so one look at the pick finds both troubles."""
    tokens = logits.argmax(axis=1) if len(logits) else np.empty(0, dtype=np.int64)
    picked = logits[np.arange(len(tokens)), tokens]
    return np.where(np.isfinite(picked), tokens, -1)


def _draw(logits: np.ndarray, sequences: Many[Sequence]) -> np.ndarray:
    params = [s.sampling for s in sequences]
    return sample_rows(
        logits,
        np.array([p.temperature for p in params], dtype=np.float64),
        np.array([p.top_k for p in params], dtype=np.int64),
        np.array([p.top_p for p in params], dtype=np.float64),
        np.array([p.min_p for p in params], dtype=np.float64),
        np.array([p.seed for p in params], dtype=np.uint64),
        np.array([s.generated for s in sequences], dtype=np.uint64),
    )


def _with_logprobs(logits: np.ndarray, tokens: np.ndarray, sequences: Many[Sequence]) -> list[Choice]:
    wanted = [r for r, s in enumerate(sequences) if s.sampling.logprobs >= 0 and tokens[r] >= 0]
    found: dict[int, TokenLogprobs | None] = {}
    if wanted:
        tops = [sequences[r].sampling.logprobs for r in wanted]
        found = dict(zip(wanted, token_logprobs(logits[wanted], tokens[wanted], tops), strict=True))
    usable = [token >= 0 and found.get(r, True) is not None for r, token in enumerate(tokens.tolist())]
    return [Choice(int(tokens[r]) if usable[r] else None, found.get(r)) for r in range(len(tokens))]


def _adjust(logits: np.ndarray, sequences: Many[Sequence]) -> np.ndarray:
    """Bias, min_tokens and penalties; the same array when no sequence asks for any, else a copy."""
    changed = [r for r, s in enumerate(sequences) if _modifies(s)]
    if not changed:
        return logits
    adjusted = logits.copy()
    for r in changed:
        _adjust_row(adjusted[r], sequences[r])
    return adjusted


def _modifies(sequence: Sequence) -> bool:
    p = sequence.sampling
    penalised = p.presence_penalty or p.frequency_penalty or p.repetition_penalty != 1.0
    return bool(penalised or p.logit_bias or sequence.generated < p.min_tokens)


def _adjust_row(row: np.ndarray, sequence: Sequence) -> None:
    """In place, in vLLM's order: bias, min_tokens, repetition (prompt and output), frequency, presence (output)."""
    p = sequence.sampling
    for token, bias in p.logit_bias.items():
        row[token] += bias
    if sequence.generated < p.min_tokens:
        row[[t for t in p.stop_token_ids if 0 <= t < len(row)]] = -np.inf
    if p.repetition_penalty != 1.0:
        seen = np.unique(sequence.tokens[: sequence.length])
        values = row[seen].astype(np.float64)
        row[seen] = np.where(values > 0, values / p.repetition_penalty, values * p.repetition_penalty)
    if p.frequency_penalty or p.presence_penalty:
        said, counts = np.unique(sequence.tokens[sequence.prompt : sequence.length], return_counts=True)
        row[said] -= p.frequency_penalty * counts + p.presence_penalty
