"""Request bodies of the API, validated: every field is honoured, neutral, or refused by name.

Responses are built in completions.py and chats.py.
"""

from collections.abc import Mapping
from itertools import islice
from typing import Annotated, Any, Literal, TypeVar

import pydantic_core
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from services.gateway.chat import TEMPLATE_VARIABLES, Turn
from services.gateway.errors import BadRequest, from_schema
from services.gateway.unsupported import check_unsupported

MAX_N = 128
MAX_PROMPTS = 1024
MAX_STOPS = 4
MAX_STOP_TOKENS = 128
MAX_BIASES = 1024
MAX_TEMPLATE_KWARGS = 64
MAX_FIELDS = 256
"""Of one JSON object; well above what there is, so that a longer one has unknown fields."""

Int64 = Annotated[int, Field(ge=-(1 << 63), lt=1 << 63)]
TokenId = Annotated[int, Field(ge=0, lt=1 << 31)]
Bias = Annotated[float, Field(ge=-100, le=100, allow_inf_nan=False)]
Penalty = Annotated[float, Field(ge=-2, le=2, allow_inf_nan=False)]
Text = Annotated[str, Field(min_length=1)]
Ids = Annotated[list[TokenId], Field(min_length=1, fail_fast=True)]
B = TypeVar("B", bound="Body")


class Body(BaseModel):
    """Base of all request bodies: exact types, no unknown fields.

    Lists fail at their first violation: to describe each of a million would take minutes.
    """

    model_config = ConfigDict(extra="forbid", strict=True)

    @model_validator(mode="before")
    @classmethod
    def _few_fields(cls, value: Any) -> Any:
        """Each unknown field is a violation of its own: the first ones are enough to refuse a million of them."""
        if not isinstance(value, Mapping) or len(value) <= MAX_FIELDS:
            return value
        unknown = islice((name for name in value if name not in cls.model_fields), MAX_FIELDS)
        return {name: value[name] for name in (*cls.model_fields, *unknown) if name in value}


def parse(kind: type[B], data: bytes) -> B:
    """JSON bytes -> request. Raises BadRequest for broken JSON (also NaN, too deep, not UTF-8) and for violations."""
    try:
        value = pydantic_core.from_json(data, allow_inf_nan=False)
    except ValueError as error:
        raise BadRequest(f"the body is not valid JSON: {error}", None, "invalid_json") from error
    if not isinstance(value, dict):
        raise BadRequest("the body must be a JSON object", None, "invalid_json")
    try:
        return kind.model_validate(value)
    except ValidationError as error:
        raise from_schema(error.errors(include_url=False, include_context=False, include_input=False)) from error


class StreamOptions(Body):
    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None


class Sampling(Body):
    """What both generating endpoints share. None means: not given."""

    model: str | None = None
    n: Annotated[int, Field(ge=1, le=MAX_N)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2, allow_inf_nan=False)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1, allow_inf_nan=False)] | None = None
    top_k: Annotated[int, Field(ge=-1, lt=1 << 31)] | None = None
    min_p: Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)] | None = None
    seed: Int64 | None = None
    presence_penalty: Penalty | None = None
    frequency_penalty: Penalty | None = None
    repetition_penalty: Annotated[float, Field(ge=1e-3, le=1e3, allow_inf_nan=False)] | None = None
    logit_bias: Annotated[dict[str, Bias], Field(max_length=MAX_BIASES)] | None = None
    stop: Text | Annotated[list[Text], Field(max_length=MAX_STOPS, fail_fast=True)] | None = None
    stop_token_ids: Annotated[list[TokenId], Field(max_length=MAX_STOP_TOKENS, fail_fast=True)] | None = None
    min_tokens: Annotated[int, Field(ge=0, lt=1 << 31)] | None = None
    ignore_eos: bool | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    return_token_ids: bool | None = None
    skip_special_tokens: bool | None = None
    user: str | None = None
    store: bool | None = None
    metadata: dict[str, Any] | None = None

    @model_validator(mode="before")
    @classmethod
    def _neutral(cls, value: Any) -> Any:
        return check_unsupported(value, cls.model_fields) if isinstance(value, Mapping) else value

    @field_validator("logit_bias", mode="before")
    @classmethod
    def _few_biases(cls, value: Any) -> Any:
        """Before every entry is looked at."""
        if isinstance(value, Mapping) and len(value) > MAX_BIASES:
            raise ValueError(f"at most {MAX_BIASES} tokens can have a bias")
        return value

    @field_validator("logit_bias")
    @classmethod
    def _token_keys(cls, value: dict[str, float] | None) -> dict[str, float] | None:
        for key in value or ():
            if not (key.isascii() and key.isdigit() and len(key) < 11):
                raise ValueError(f"the key {key[:20]!r} is not a token id")
        return value

    @property
    def stops(self) -> tuple[str, ...]:
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())

    @property
    def skips_special(self) -> bool:
        return self.skip_special_tokens is not False

    @property
    def choices(self) -> int:
        return self.n or 1

    def check(self) -> None:
        """Rules between fields. Raises BadRequest."""
        if self.stream_options is not None and not self.stream:
            raise BadRequest("stream_options: only allowed together with stream", "stream_options")


class CompletionRequest(Sampling):
    prompt: (
        Text
        | Annotated[list[Text], Field(min_length=1, max_length=MAX_PROMPTS, fail_fast=True)]
        | Ids
        | Annotated[list[Ids], Field(min_length=1, max_length=MAX_PROMPTS, fail_fast=True)]
    )
    max_tokens: Annotated[int, Field(ge=0, lt=1 << 31)] | None = None
    logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    echo: bool | None = None
    best_of: int | None = None

    @property
    def prompts(self) -> list[str] | list[list[int]]:
        """One entry per prompt."""
        if isinstance(self.prompt, str):
            return [self.prompt]
        if isinstance(self.prompt[0], int):
            return [self.prompt]  # type: ignore[list-item]
        return self.prompt  # type: ignore[return-value]

    def check(self) -> None:
        super().check()
        if self.best_of is not None and self.best_of != self.choices:
            raise BadRequest("best_of: only the value of n is supported", "best_of", "unsupported")
        if self.max_tokens == 0 and not self.echo:
            raise BadRequest("max_tokens: 0 is only allowed together with echo", "max_tokens")


class TextPart(Body):
    type: Literal["text"]
    text: str


class ChatMessage(Body):
    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | Annotated[list[TextPart], Field(fail_fast=True)] | None = None
    name: str | None = None
    tool_call_id: str | None = None
    refusal: str | None = None
    tool_calls: Annotated[list[Any], Field(max_length=0)] | None = None
    function_call: None = None
    audio: None = None
    annotations: list[Any] | None = None

    @model_validator(mode="after")
    def _has_content(self) -> "ChatMessage":
        if self.content is None and self.role != "assistant":
            raise ValueError(f"content: required in a message of role {self.role}")
        return self

    def plain(self) -> dict[str, Any]:
        """As templates expect it: text content, absent fields absent."""
        parts = self.content if isinstance(self.content, list) else None
        text = "\n".join(p.text for p in parts) if parts is not None else (self.content or "")
        extra = {"name": self.name, "tool_call_id": self.tool_call_id}
        return {"role": self.role, "content": text} | {k: v for k, v in extra.items() if v is not None}


class Templated(Body):
    """How messages become a prompt."""

    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    chat_template_kwargs: Annotated[dict[str, Any], Field(max_length=MAX_TEMPLATE_KWARGS)] | None = None

    @property
    def turn(self) -> Turn:
        if self.continue_final_message:
            return "continue"
        return "none" if self.add_generation_prompt is False else "assistant"

    def check_template(self) -> None:
        """Raises BadRequest."""
        if self.continue_final_message and self.add_generation_prompt:
            raise BadRequest(
                "continue_final_message: cannot be true together with add_generation_prompt", "continue_final_message"
            )
        if taken := TEMPLATE_VARIABLES.intersection(self.chat_template_kwargs or ()):
            raise BadRequest(
                f"chat_template_kwargs: {', '.join(sorted(taken))} cannot be set here", "chat_template_kwargs"
            )


class ChatRequest(Templated, Sampling):
    messages: Annotated[list[ChatMessage], Field(min_length=1, fail_fast=True)]
    max_tokens: Annotated[int, Field(ge=1, lt=1 << 31)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1, lt=1 << 31)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None

    def check(self) -> None:
        super().check()
        self.check_template()
        if self.top_logprobs is not None and not self.logprobs:
            raise BadRequest("top_logprobs: needs logprobs: true", "top_logprobs")


class TokenizeRequest(Templated):
    """``prompt`` or ``messages``; a prompt gets the model's special tokens unless told otherwise."""

    model: str | None = None
    prompt: str | None = None
    messages: Annotated[list[ChatMessage], Field(min_length=1, fail_fast=True)] | None = None
    add_special_tokens: bool | None = None
    return_token_strs: bool | None = None

    @model_validator(mode="after")
    def _one_of(self) -> "TokenizeRequest":
        if (self.prompt is None) == (self.messages is None):
            raise ValueError("give either prompt or messages")
        return self

    def check(self) -> None:
        """Rules between fields. Raises BadRequest."""
        self.check_template()
        for name in Templated.model_fields if self.messages is None else ():
            if getattr(self, name) is not None:
                raise BadRequest(f"{name}: only allowed together with messages", name)


class DetokenizeRequest(Body):
    model: str | None = None
    tokens: Annotated[list[TokenId], Field(fail_fast=True)]
