"""From token ids to the text a client may see: incremental detokenization and stop strings.

Pure and one token at a time, so that a stream and a plain answer cannot differ. Knows no HTTP and no tokenizer files.
"""

from collections.abc import Callable, Sequence

CONTEXT_TOKENS = 6
"""Prompt tokens that give the first output token its place (leading spaces of sentencepiece-like tokenizers)."""
MAX_PENDING = 64
"""A character spans at most four tokens; what stays incomplete for longer was never valid text."""
REPLACEMENT = "\ufffd"


class Detokenizer:
    """Decodes a growing list of tokens without ever showing half a character.

    Two offsets into the ids, as in vLLM's ``detokenize_incrementally``: the text of ``ids[prefix:read]`` has been
    given out; decoding it again together with what follows keeps the decoder's left context.

    Args:
        decode: ids -> text.
        special: ids without text.
        prompt: token ids before the output.
    """

    def __init__(self, decode: Callable[[list[int]], str], special: frozenset[int], prompt: Sequence[int]) -> None:
        self._decode = decode
        self._special = special
        self._ids = [i for i in prompt[-CONTEXT_TOKENS:] if i not in special]
        self._shown = decode(self._ids)
        if self._shown.endswith(REPLACEMENT):  # the prompt ends inside a character: no use as context
            self._ids, self._shown = [], ""
        self._read = len(self._ids)

    def push(self, token: int) -> str:
        """Text that ``token`` completes, often empty or more than one character."""
        if token in self._special:
            return ""
        self._ids.append(token)
        text = self._decode(self._ids)
        pending = len(self._ids) - self._read
        if (len(text) > len(self._shown) and not text.endswith(REPLACEMENT)) or pending > MAX_PENDING:
            return self._advance(text)
        return ""

    def flush(self) -> str:
        """What is left at the end: an incomplete character shows as U+FFFD."""
        return self._advance(self._decode(self._ids))

    def _advance(self, text: str) -> str:
        new = text[len(self._shown) :]
        self._ids = self._ids[self._read :]
        self._shown = self._decode(self._ids)
        self._read = len(self._ids)
        return new


class StopStrings:
    """Finds the stop string that completes first and never shows a part of one.

    Of several that complete with the same character the one that began first wins.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = stops
        self._hold = max((len(s) for s in stops), default=1) - 1
        self._held = ""
        self.found: str | None = None

    def push(self, text: str, search: bool = True) -> str:
        """Text that may be shown after ``text`` was appended; everything from a stop string on is dropped."""
        buffer = self._held + text
        match = self._first(buffer) if search and text else None
        if match:
            start, self.found = match
            self._held = ""
            return buffer[:start]
        cut = max(len(buffer) - self._hold, 0)
        self._held = buffer[cut:]
        return buffer[:cut]

    def flush(self) -> str:
        held, self._held = self._held, ""
        return held

    def _first(self, buffer: str) -> tuple[int, str] | None:
        """Only matches that end in the new text: older ones were found before, or were not to be looked for."""
        matches = []
        for stop in self._stops:
            start = buffer.find(stop, max(len(self._held) - len(stop) + 1, 0))
            if start >= 0:
                matches.append((start + len(stop), start, stop))
        return min(matches)[1:] if matches else None


class OutputText:
    """Detokenizer and stop strings of one choice.

    Args:
        min_tokens: stop strings that complete within the first ``min_tokens`` tokens do not count.
    """

    def __init__(self, detokenizer: Detokenizer, stops: Sequence[str], min_tokens: int = 0) -> None:
        self._detokenizer = detokenizer
        self._stops = StopStrings(stops)
        self._min_tokens = min_tokens
        self._tokens = 0
        self.length = 0
        """Characters decoded so far, shown or held: where the next token's text begins."""

    @property
    def stopped(self) -> str | None:
        """The stop string that ended the text."""
        return self._stops.found

    def push(self, token: int) -> str:
        self._tokens += 1
        text = self._detokenizer.push(token)
        self.length += len(text)
        return self._stops.push(text, search=self._tokens > self._min_tokens)

    def finish(self) -> str:
        """The rest; a stop string may still complete in it."""
        shown = self._stops.push(self._detokenizer.flush(), search=self._tokens > self._min_tokens)
        return shown if self.stopped else shown + self._stops.flush()
