"""``moemesh chat`` and ``moemesh complete`` as a person runs them, against a gateway."""

import subprocess
import sys

import httpx
from rich.control import strip_control_codes

SETTINGS = {"max_tokens": 12, "temperature": 0.5, "seed": 5}
FLAGS = ("--max-tokens", "12", "--temperature", "0.5", "--seed", "5")
LIMIT_S = 120


def moemesh(*args: str, typed: str = "") -> subprocess.CompletedProcess[str]:
    """The command's end, after ``typed`` was typed into it."""
    return subprocess.run(
        [sys.executable, "-m", "shared.cli.main", *args],
        input=typed, capture_output=True, text=True, timeout=LIMIT_S, check=False,
    )  # fmt: skip


def answer(url: str, messages: list[dict[str, str]]) -> str:
    body = {"messages": messages, **SETTINGS}
    whole = httpx.post(url + "/v1/chat/completions", json=body, timeout=LIMIT_S).json()
    return whole["choices"][0]["message"]["content"]


def test_chat_answers_line_by_line_and_remembers_what_was_said(api_url: str) -> None:
    messages = [{"role": "user", "content": "Who made the earth?"}]
    first = answer(api_url, messages)
    messages += [{"role": "assistant", "content": first}, {"role": "user", "content": "And then :smile: [b]?"}]
    second = answer(api_url, messages)
    typed = "Who made the earth?\nAnd then :smile: [b]?\n\nnever sent\n"
    ended = moemesh("chat", "--url", api_url, *FLAGS, typed=typed)
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout == strip_control_codes(f"> {first}\n> {second}\n> ")


def test_chat_ends_with_the_input(api_url: str) -> None:
    assert moemesh("chat", "--url", api_url).returncode == 0


def test_complete_prints_the_text_and_its_continuation(api_url: str) -> None:
    text = "In the beginning"
    body = {"prompt": text, **SETTINGS}
    expected = httpx.post(api_url + "/v1/completions", json=body, timeout=LIMIT_S).json()["choices"][0]["text"]
    ended = moemesh("complete", text, "--url", api_url, *FLAGS)
    assert ended.stdout == strip_control_codes(f"{text}{expected}\n"), ended.stderr


def test_what_goes_wrong_is_one_line_and_a_status(api_url: str) -> None:
    absent = moemesh("chat", "--url", "http://127.0.0.1:1", typed="hello\n")
    refused = moemesh("chat", "--url", api_url, "--max-tokens", "1000000", typed="hello\n")
    for ended, words in ((absent, "is the mesh up?"), (refused, "400 this model's context is")):
        assert ended.returncode == 1
        assert words in ended.stderr and len(ended.stderr.splitlines()) == 1
