"""Chat messages to a prompt text, by the model's own Jinja template, rendered as transformers renders it.

Templates come from the hub and are not trusted: the environment is sandboxed and sees plain JSON values only.
The environment follows transformers/utils/chat_template_utils.py.
"""

import json
from collections.abc import Mapping
from datetime import datetime
from typing import Any, Literal

from jinja2 import TemplateError, nodes
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace

from services.gateway.errors import BadRequest
from shared.errors import ModelError

Turn = Literal["assistant", "none", "continue"]
CONTINUE_TAG = "CONTINUE_FINAL_MESSAGE_TAG "
"""Marks the end of the message to continue; its space shows whether the template trims messages."""
TEMPLATE_VARIABLES = frozenset(
    ("messages", "tools", "documents", "add_generation_prompt", "continue_final_message", "chat_template", "tokenize")
)
"""Names that a client may not give to a template."""


class _Generation(Extension):
    """``{% generation %}`` marks assistant text for training; here its body is simply rendered."""

    tags = {"generation"}  # noqa: RUF012 - jinja2's own form

    def parse(self, parser: Parser) -> nodes.Node | list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class _Dict:
    """``dict`` for templates: makes one, and has nothing else to offer."""

    def __call__(self, *args: Any, **kwargs: Any) -> dict[Any, Any]:
        return dict(*args, **kwargs)


class _Namespace(Namespace):
    """``namespace`` for templates, without attributes that reach into Python."""

    def __setitem__(self, name: str, value: Any) -> None:
        if name.startswith("_"):
            raise SecurityError(f"a template may not set the attribute {name!r}")
        super().__setitem__(name, value)


def _raise(message: str) -> None:
    raise TemplateError(message)


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _environment() -> ImmutableSandboxedEnvironment:
    env = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols])
    env.filters["tojson"] = _to_json
    env.globals["raise_exception"] = _raise
    env.globals["dict"] = _Dict()
    env.globals["namespace"] = _Namespace
    env.globals["strftime_now"] = lambda form: datetime.now().strftime(form)  # the local date is meant
    return env


class ChatTemplate:
    """A compiled template.

    Args:
        source: Jinja text; None when the model has no template.
        special_tokens: names such as ``bos_token`` that templates use.
    """

    def __init__(self, source: str | None, special_tokens: dict[str, str]) -> None:
        self._special_tokens = special_tokens
        try:
            self._template = _environment().from_string(source) if source is not None else None
        except TemplateError as error:
            raise ModelError("chat template", str(error)) from error

    def render(
        self, messages: list[dict[str, Any]], variables: Mapping[str, Any] = {}, turn: Turn = "assistant"
    ) -> str:
        """The prompt text.

        Args:
            variables: more of them for the template, e.g. ``enable_thinking``.
            turn: what the text is ready for: the assistant's next message, nothing, or more of the last message.

        Raises BadRequest when the template refuses.
        """
        if turn != "continue":
            return self._render(messages, variables, turn == "assistant")
        last = messages[-1] | {"content": messages[-1]["content"] + CONTINUE_TAG}
        return _up_to_tag(self._render([*messages[:-1], last], variables, False))

    def _render(self, messages: list[dict[str, Any]], variables: Mapping[str, Any], generation_prompt: bool) -> str:
        if self._template is None:
            raise BadRequest("this model has no chat template; use /v1/completions", None, "no_chat_template")
        own = {"messages": messages, "tools": None, "documents": None, "add_generation_prompt": generation_prompt}
        try:
            return self._template.render({**self._special_tokens, **variables, **own})
        except (TemplateError, TypeError, ValueError, LookupError, AttributeError, ArithmeticError) as error:
            raise BadRequest(f"the model's chat template refused these messages: {error}", "messages") from error


def _up_to_tag(text: str) -> str:
    """The text before the tag; where the template trims messages, without spaces at its end."""
    at = text.rfind(CONTINUE_TAG.rstrip())
    if at < 0:
        raise BadRequest(
            "continue_final_message: the model's chat template does not show the last message", "continue_final_message"
        )
    return text[:at] if text.startswith(CONTINUE_TAG, at) else text[:at].rstrip()


def special_tokens(tokenizer_config: Mapping[str, Any]) -> dict[str, str]:
    """``bos_token`` and the like from tokenizer_config.json, which holds strings or {"content": ...}."""
    found = {}
    for name, value in tokenizer_config.items():
        text = value.get("content") if isinstance(value, dict) else value
        if name.endswith("_token") and isinstance(text, str):
            found[name] = text
    return found
