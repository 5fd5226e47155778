"""From a validated request to SamplingParams: defaults, limits, seeds. Pure but for the drawing of seeds.

Defaults: request > the model's generation_config.json > OpenAI's.
"""

import secrets
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pydantic import ValidationError

from services.gateway.errors import BadRequest, from_schema
from services.gateway.protocol import ChatRequest, CompletionRequest, Sampling
from shared.errors import ModelError
from shared.request_messages import SamplingParams

COMPLETION_MAX_TOKENS = 16
GREEDY_BELOW = 1e-5
_SEEDS = 1 << 64
_DEFAULTED = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")


@dataclass(frozen=True)
class Limits:
    """What the model and the mesh allow, and the model's own defaults."""

    context: int
    """Longest prompt + output, in tokens."""
    vocab: int
    eos: tuple[int, ...]
    defaults: dict[str, Any]
    """Sampling fields of generation_config.json."""
    max_new_tokens: int | None = None


def generation_defaults(generation_config: Mapping[str, Any]) -> dict[str, Any]:
    """Sampling fields of generation_config.json that are set. Raises ModelError when a value is out of range."""
    found = {k: v for k in _DEFAULTED if (v := generation_config.get(k)) is not None}
    found["top_k"] = max(found.get("top_k", 0), 0)
    try:
        SamplingParams(max_tokens=0, **found)
    except ValidationError as error:
        raise ModelError("generation_config.json", str(error)) from error
    return found


def check_tokens(request: Sampling, limits: Limits) -> None:
    """Token ids in the request must exist. Raises BadRequest."""
    for field, ids in (("logit_bias", request.logit_bias), ("stop_token_ids", request.stop_token_ids)):
        bad = next((i for i in ids or () if int(i) >= limits.vocab), None)
        if bad is not None:
            raise BadRequest(f"{field}: {bad} is not a token id; the vocabulary has {limits.vocab}", field)


def check_prompt(ids: list[int], limits: Limits, param: str) -> None:
    """Raises BadRequest for an empty prompt and for ids that do not exist."""
    if not ids:
        raise BadRequest(f"{param}: the prompt has no tokens", param)
    if max(ids) >= limits.vocab:
        raise BadRequest(f"{param}: {max(ids)} is not a token id; the vocabulary has {limits.vocab}", param)


def output_limit(request: CompletionRequest | ChatRequest, prompt_tokens: int, limits: Limits) -> int:
    """Most output tokens for a prompt of this length. Raises BadRequest when the context does not hold both."""
    field, asked = _asked(request)
    room = limits.context - prompt_tokens
    if room < (0 if asked == 0 else 1):
        raise _too_long("prompt" if isinstance(request, CompletionRequest) else "messages", prompt_tokens, None, limits)
    if asked is None:
        default = COMPLETION_MAX_TOKENS if isinstance(request, CompletionRequest) else limits.max_new_tokens
        return min(room, default or room)
    if asked > room:
        raise _too_long(field, prompt_tokens, asked, limits)
    return asked


def _asked(request: CompletionRequest | ChatRequest) -> tuple[str, int | None]:
    if isinstance(request, ChatRequest) and request.max_completion_tokens is not None:
        return "max_completion_tokens", request.max_completion_tokens
    return "max_tokens", request.max_tokens


def _too_long(param: str, prompt: int, output: int | None, limits: Limits) -> BadRequest:
    asked = f"{prompt} prompt tokens" + (f" and {output} output tokens" if output is not None else "")
    message = f"this model's context is {limits.context} tokens, but the request has {asked}"
    return BadRequest(message, param, "context_length_exceeded")


def sampling_params(
    request: CompletionRequest | ChatRequest, max_tokens: int, child: int, limits: Limits
) -> SamplingParams:
    """Parameters of choice ``child`` (0 .. n-1) of one prompt. Raises BadRequest naming the field."""
    if (request.min_tokens or 0) > max_tokens:
        raise BadRequest(f"min_tokens: more than the {max_tokens} output tokens allowed", "min_tokens")
    given = {k: v for k in _DEFAULTED if (v := getattr(request, k)) is not None}
    chosen = limits.defaults | given
    chosen["top_k"] = max(chosen.get("top_k", 0), 0)
    if chosen.get("temperature", 1.0) < GREEDY_BELOW:
        chosen["temperature"] = 0.0
    logprobs = _logprobs(request)
    echo = isinstance(request, CompletionRequest) and request.echo
    try:
        return SamplingParams(
            max_tokens=max_tokens,
            seed=_seed(request.seed, child),
            presence_penalty=request.presence_penalty or 0.0,
            frequency_penalty=request.frequency_penalty or 0.0,
            logit_bias={int(k): v for k, v in (request.logit_bias or {}).items()},
            min_tokens=request.min_tokens or 0,
            stop_token_ids=_stop_tokens(request, limits),
            logprobs=logprobs,
            prompt_logprobs=logprobs if echo else -1,
            **chosen,
        )
    except ValidationError as error:
        raise from_schema(error.errors(include_url=False)) from error


def _logprobs(request: CompletionRequest | ChatRequest) -> int:
    if isinstance(request, CompletionRequest):
        return -1 if request.logprobs is None else request.logprobs
    return (request.top_logprobs or 0) if request.logprobs else -1


def _stop_tokens(request: Sampling, limits: Limits) -> tuple[int, ...]:
    eos = () if request.ignore_eos else limits.eos
    return tuple(sorted({*eos, *(request.stop_token_ids or ())}))


def _seed(seed: int | None, child: int) -> int:
    """Seeds are 64-bit words; a negative one wraps. Without one every choice draws its own."""
    return secrets.randbits(64) if seed is None else (seed + child) % _SEEDS
