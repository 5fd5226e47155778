"""Log-probabilities in the two formats of the API. Pure."""

from collections.abc import Sequence
from typing import Any

from services.gateway.tokenizer import Tokenizer
from shared.request_messages import TokenLogprobs

FLOOR = -9999.0
"""Shown instead of minus infinity, which JSON cannot say."""


def completion_logprobs(
    tokenizer: Tokenizer,
    tokens: Sequence[int],
    logprobs: Sequence[TokenLogprobs],
    offsets: Sequence[int],
    count: int,
) -> dict[str, list[Any]]:
    """``logprobs`` of a completion choice: parallel lists, one entry per token.

    ``top_logprobs`` holds ``count`` alternatives and always the token itself.
    """
    return {
        "tokens": [tokenizer.token_text(token) for token in tokens],
        "token_logprobs": [_shown(one.logprob) for one in logprobs],
        "top_logprobs": [
            _alternatives(tokenizer, token, one, count) for token, one in zip(tokens, logprobs, strict=True)
        ],
        "text_offset": list(offsets),
    }


def _alternatives(tokenizer: Tokenizer, token: int, one: TokenLogprobs, count: int) -> dict[str, float | None] | None:
    if one.logprob is None:
        return None
    found: dict[str, float | None] = {}
    for other, logprob in one.top[:count]:  # two tokens may read the same: the more probable one stays
        found.setdefault(tokenizer.token_text(other), _shown(logprob))
    found.setdefault(tokenizer.token_text(token), _shown(one.logprob))
    return found


def chat_logprobs(
    tokenizer: Tokenizer, tokens: Sequence[int], logprobs: Sequence[TokenLogprobs], count: int
) -> dict[str, Any]:
    """``logprobs`` of a chat choice: one object per token."""
    content = [
        _entry(tokenizer, token, one.logprob)
        | {"top_logprobs": [_entry(tokenizer, other, logprob) for other, logprob in one.top[:count]]}
        for token, one in zip(tokens, logprobs, strict=True)
    ]
    return {"content": content, "refusal": None}


def _entry(tokenizer: Tokenizer, token: int, logprob: float | None) -> dict[str, Any]:
    data = tokenizer.token_bytes(token)
    return {"token": data.decode(errors="replace"), "logprob": _shown(logprob), "bytes": list(data)}


def _shown(logprob: float | None) -> float | None:
    return None if logprob is None else max(logprob, FLOOR)
