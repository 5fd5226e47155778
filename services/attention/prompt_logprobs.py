"""Log-probabilities of prompt tokens, collected chunk by chunk while a prompt is prefilled."""

from collections.abc import Callable, Iterable, Iterator

import numpy as np

from services.attention.batching import Chunk
from services.attention.sampler import token_logprobs
from services.attention.sequence import Sequence
from shared.request_messages import TokenLogprobs

LogitsOf = Callable[[np.ndarray], Iterator[tuple[int, np.ndarray]]]
"""Rows of the step (int64) -> their logits, some at a time: (index of the first, fp32 [n, vocab])."""


def collect(chunks: Iterable[Chunk], logits_of: LogitsOf) -> list[Sequence]:
    """Extend ``prompt_logprobs`` of the sequences that want them; returns those with a NaN in their logits.

    After a preemption rows come by again: what is there already is not made twice.
    """
    broken = []
    offset = 0
    for chunk in chunks:
        sequence = chunk.sequence
        wanted = sequence.wants_prompt_logprobs and len(sequence.prompt_logprobs) < sequence.prompt
        if wanted and not _extend(chunk, offset, logits_of):
            broken.append(sequence)
        offset += chunk.count
    return broken


def _extend(chunk: Chunk, offset: int, logits_of: LogitsOf) -> bool:
    """Row p of a sequence predicts its token p + 1; the first token is predicted by nothing."""
    sequence, have = chunk.sequence, chunk.sequence.prompt_logprobs
    if not have:
        have.append(TokenLogprobs(logprob=None))
    positions = np.arange(max(chunk.start + 1, len(have)), min(chunk.start + chunk.count + 1, sequence.prompt))
    tokens = sequence.tokens[positions].astype(np.int64)
    for first, logits in logits_of(offset + positions - 1 - chunk.start):
        part = tokens[first : first + len(logits)]
        found = token_logprobs(logits, part, [sequence.sampling.prompt_logprobs] * len(part))
        have.extend(one for one in found if one is not None)
    return len(have) >= min(chunk.start + chunk.count + 1, sequence.prompt)
