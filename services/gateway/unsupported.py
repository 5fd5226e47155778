"""Fields that other servers know and this one does not: neutral values pass, the rest is refused by name.

A field that changes the output must never be ignored silently. null is neutral for all of them.
"""

from collections.abc import Collection, Mapping
from typing import Any

from services.gateway.errors import BadRequest

ANY = object()
"""Informational fields: no value changes the output."""

_NONE: tuple[Any, ...] = ()
NEUTRAL: dict[str, tuple[Any, ...]] = {
    # OpenAI
    "suffix": ("",),
    "tools": _NONE,
    "tool_choice": ("none",),
    "parallel_tool_calls": (True, False),
    "functions": _NONE,
    "function_call": ("none",),
    "response_format": ({"type": "text"},),
    "reasoning_effort": ("none",),
    "audio": _NONE,
    "modalities": (["text"],),
    "moderation": _NONE,
    "prediction": _NONE,
    "prompt_cache_key": (ANY,),
    "prompt_cache_options": _NONE,
    "prompt_cache_retention": ("in_memory", "in-memory"),
    "safety_identifier": (ANY,),
    "service_tier": ("auto", "default"),
    "verbosity": ("medium",),
    "web_search_options": _NONE,
    # extensions of vLLM and SGLang
    "add_generation_prompt": (True,),
    "add_special_tokens": _NONE,
    "allowed_token_ids": _NONE,
    "bad_words": ([],),
    "best_of": (1,),
    "cache_salt": _NONE,
    "chat_template": _NONE,
    "chat_template_kwargs": ({},),
    "continue_final_message": (False,),
    "documents": _NONE,
    "echo": (False,),
    "ebnf": _NONE,
    "include_reasoning": (True,),
    "include_stop_str_in_output": (False,),
    "json_schema": _NONE,
    "length_penalty": (1,),
    "lora_path": _NONE,
    "mm_processor_kwargs": ({},),
    "no_stop_trim": (False,),
    "priority": (0,),
    "prompt_embeds": _NONE,
    "prompt_logprobs": _NONE,
    "regex": _NONE,
    "request_id": _NONE,
    "return_hidden_states": (False,),
    "return_tokens_as_token_ids": (False,),
    "rid": _NONE,
    "separate_reasoning": (True,),
    "session_id": _NONE,
    "session_params": _NONE,
    "spaces_between_special_tokens": (True,),
    "stop_regex": _NONE,
    "stream_interval": (1,),
    "stream_reasoning": (True,),
    "structured_outputs": _NONE,
    "thinking_token_budget": _NONE,
    "truncate_prompt_tokens": _NONE,
    "truncation_side": _NONE,
    "use_beam_search": (False,),
}


def check_unsupported(body: Mapping[str, Any], honoured: Collection[str]) -> dict[str, Any]:
    """The body without neutral unsupported fields. Raises BadRequest for the first one with another value.

    Args:
        honoured: fields of this endpoint's own schema.
    """
    foreign = {name: neutral for name, neutral in NEUTRAL.items() if name in body and name not in honoured}
    for name, neutral in foreign.items():
        value = body[name]
        if value is not None and not any(n is ANY or _same(value, n) for n in neutral):
            raise BadRequest(_message(name, neutral), name, "unsupported")
    return {name: value for name, value in body.items() if name not in foreign}


def _same(value: Any, neutral: Any) -> bool:
    return value == neutral and isinstance(value, bool) == isinstance(neutral, bool)


def _message(name: str, neutral: tuple[Any, ...]) -> str:
    if not neutral:
        return f"{name}: this field is not supported"
    return f"{name}: this field is only supported with the value {neutral[0]!r}"
