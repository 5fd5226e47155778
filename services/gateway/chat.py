"""Chat messages to a prompt text, by the model's own Jinja template, rendered as transformers renders it.

Templates come from the hub and are not trusted: the environment is sandboxed and sees plain JSON values only.
The environment follows transformers/utils/chat_template_utils.py.
"""

import json
from collections.abc import Mapping
from datetime import datetime
from typing import Any

from jinja2 import TemplateError, nodes
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace

from services.gateway.errors import BadRequest
from shared.errors import ModelError


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

    def render(self, messages: list[dict[str, Any]]) -> str:
        """The prompt text, ready for the assistant's turn. Raises BadRequest when the template refuses."""
        if self._template is None:
            raise BadRequest("this model has no chat template; use /v1/completions", None, "no_chat_template")
        try:
            return self._template.render(
                messages=messages,
                tools=None,
                documents=None,
                add_generation_prompt=True,
                **self._special_tokens,
            )
        except (TemplateError, TypeError, ValueError, LookupError, AttributeError, ArithmeticError) as error:
            raise BadRequest(f"the model's chat template refused these messages: {error}", "messages") from error


def special_tokens(tokenizer_config: Mapping[str, Any]) -> dict[str, str]:
    """``bos_token`` and the like from tokenizer_config.json, which holds strings or {"content": ...}."""
    found = {}
    for name, value in tokenizer_config.items():
        text = value.get("content") if isinstance(value, dict) else value
        if name.endswith("_token") and isinstance(text, str):
            found[name] = text
    return found
