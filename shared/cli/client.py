"""``moemesh complete`` and ``moemesh chat``: a terminal in front of the gateway's HTTP API."""

import json
from collections.abc import Iterator
from typing import Annotated, Any

import httpx
import typer
from rich.console import Console

from shared.errors import MoemeshError

Url = Annotated[str, typer.Option(envvar="MOEMESH_URL", help="address of the gateway")]
ApiKey = Annotated[str, typer.Option(envvar="MOEMESH_API_KEY", help="bearer token, when the gateway wants one")]
MaxTokens = Annotated[int, typer.Option(min=1, help="longest answer, in tokens")]
Temperature = Annotated[float, typer.Option(min=0, max=2, help="0 = greedy")]
Seed = Annotated[int | None, typer.Option(help="same seed, same text")]
DEFAULT_URL = "http://127.0.0.1:8000"


class ApiError(MoemeshError):
    """The gateway cannot be reached or answered with an error."""


def stream_events(url: str, path: str, body: dict[str, Any], api_key: str = "") -> Iterator[dict[str, Any]]:
    """POST ``body`` and yield the JSON of every server-sent event. Raises ApiError."""
    headers = {"authorization": f"Bearer {api_key}"} if api_key else {}
    timeout = httpx.Timeout(5.0, read=600.0)
    try:
        with httpx.stream("POST", url + path, json=body, headers=headers, timeout=timeout) as response:
            if response.status_code != 200:
                response.read()
                raise ApiError(f"{url}{path}: {response.status_code} {error_text(response)}")
            yield from parse_events(response.iter_lines())
    except httpx.HTTPError as error:
        raise ApiError(f"{url}: {error}; is the mesh up? (moemesh up)") from error


def error_text(response: httpx.Response) -> str:
    """The message inside an OpenAI-style error body, or the body itself."""
    try:
        return str(response.json()["error"]["message"])
    except (ValueError, KeyError, TypeError):
        return response.text[:500]


def parse_events(lines: Iterator[str]) -> Iterator[dict[str, Any]]:
    """JSON objects of ``data:`` lines up to ``[DONE]``. Raises ApiError for an error event."""
    for line in lines:
        if not line.startswith("data: ") or line == "data: [DONE]":
            continue
        event = json.loads(line.removeprefix("data: "))
        if "error" in event:
            raise ApiError(event["error"]["message"])
        yield event


def stream_completion(url: str, body: dict[str, Any], api_key: str = "") -> Iterator[str]:
    """Text pieces of one streamed completion."""
    for event in stream_events(url, "/v1/completions", {**body, "stream": True}, api_key):
        yield from (choice["text"] for choice in event["choices"])


def stream_chat(url: str, body: dict[str, Any], api_key: str = "") -> Iterator[str]:
    """Text pieces of one streamed chat answer."""
    for event in stream_events(url, "/v1/chat/completions", {**body, "stream": True}, api_key):
        yield from (choice["delta"].get("content") or "" for choice in event["choices"])


def plain_console() -> Console:
    """Shows what the model wrote as it is: no markup, no ``:smile:`` made into a picture."""
    return Console(highlight=False, markup=False, emoji=False)


def complete(
    text: Annotated[str, typer.Argument(help="the text to continue")],
    url: Url = DEFAULT_URL,
    max_tokens: MaxTokens = 64,
    temperature: Temperature = 0.7,
    seed: Seed = None,
    api_key: ApiKey = "",
) -> None:
    """Continue TEXT and print it as it comes."""
    out = plain_console()
    out.print(text, end="", style="dim", soft_wrap=True)
    body = {"prompt": text, "max_tokens": max_tokens, "temperature": temperature, "seed": seed}
    for piece in stream_completion(url, body, api_key):
        out.print(piece, end="", soft_wrap=True)
    out.print()


def chat(
    url: Url = DEFAULT_URL,
    max_tokens: MaxTokens = 256,
    temperature: Temperature = 0.7,
    seed: Seed = None,
    api_key: ApiKey = "",
) -> None:
    """Talk to the model; an empty line or Ctrl-D ends it."""
    out = plain_console()
    messages: list[dict[str, str]] = []
    while line := ask(out):
        messages.append({"role": "user", "content": line})
        answer = ""
        body = {"messages": messages, "max_tokens": max_tokens, "temperature": temperature, "seed": seed}
        for piece in stream_chat(url, body, api_key):
            answer += piece
            out.print(piece, end="", soft_wrap=True)
        out.print()
        messages.append({"role": "assistant", "content": answer})


def ask(out: Console) -> str:
    """One line from the person, "" at the end of input."""
    try:
        return out.input("> ")
    except EOFError:
        return ""
