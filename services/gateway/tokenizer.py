"""The model's tokenizer (Hugging Face ``tokenizer.json``): encode, decode, and what single tokens look like.

Chat templates are in chat.py, incremental decoding in text.py.
"""

import asyncio
import re
from functools import lru_cache, partial
from pathlib import Path

from tokenizers import Tokenizer as HfTokenizer

from services.gateway.text import REPLACEMENT, Detokenizer
from shared.errors import ModelError

THREAD_ABOVE = 4096
"""Characters; encoding a longer text would hold up the event loop."""
_BYTE_PIECE = re.compile(r"<0x([0-9A-Fa-f]{2})>")


class Tokenizer:
    """Thread-safe reader around one ``tokenizer.json``. Raises ModelError when the file is unusable."""

    def __init__(self, path: Path) -> None:
        try:
            self._hf = HfTokenizer.from_file(str(path))
        except Exception as error:  # tokenizers raises nothing narrower
            raise ModelError(str(path), f"not a usable tokenizer: {error}") from error
        self._hf.no_truncation()
        self._hf.no_padding()
        added = self._hf.get_added_tokens_decoder()
        self.special = frozenset(i for i, token in added.items() if token.special)
        self.size = self._hf.get_vocab_size(with_added_tokens=True)
        self._anchor = self._hf.encode("a", add_special_tokens=False).ids[:1]
        self._anchor_text = self._hf.decode(self._anchor)
        self._describe = lru_cache(maxsize=8192)(self._token_bytes)

    async def encode(self, text: str, special: bool) -> list[int]:
        """Token ids; ``special`` adds what the model expects around a text (a beginning-of-sequence token, say)."""
        if len(text) > THREAD_ABOVE:
            return await asyncio.to_thread(self._encode, text, special)
        return self._encode(text, special)

    def _encode(self, text: str, special: bool) -> list[int]:
        """As a batch of one: ``encode`` itself would keep the interpreter's lock, for many seconds in a long text."""
        return self._hf.encode_batch_fast([text], add_special_tokens=special)[0].ids

    def decode(self, ids: list[int], skip_special: bool = True) -> str:
        """Text of ``ids``; ids beyond the vocabulary have none."""
        return self._hf.decode(ids, skip_special_tokens=skip_special)

    def detokenizer(self, prompt: list[int], skip_special: bool = True) -> Detokenizer:
        silent = self.special if skip_special else frozenset[int]()
        return Detokenizer(partial(self.decode, skip_special=skip_special), silent, prompt)

    def token_bytes(self, token: int) -> bytes:
        """UTF-8 bytes that a token stands for inside a text; may be a part of a character."""
        return self._describe(token)

    def token_text(self, token: int) -> str:
        """The token's text for logprobs; tokens that are no whole characters look like ``bytes:\\xe2\\x80``."""
        data = self.token_bytes(token)
        try:
            return data.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)

    def _token_bytes(self, token: int) -> bytes:
        piece = self._hf.id_to_token(token)
        if piece is None:
            return b""
        if token in self.special:
            return piece.encode()
        if match := _BYTE_PIECE.fullmatch(piece):
            return bytes([int(match[1], 16)])
        # Behind another token, because a decoder may strip the space in front of the first one.
        text = self._hf.decode([*self._anchor, token], skip_special_tokens=False)[len(self._anchor_text) :]
        if REPLACEMENT in text and all(c in BYTE_LEVEL for c in piece):
            return bytes(BYTE_LEVEL[c] for c in piece)
        return text.encode()


def _byte_level_alphabet() -> dict[str, int]:
    """Character -> byte of byte-level BPE (GPT-2's ``bytes_to_unicode``, inverted)."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [b for b in range(256) if b not in printable]
    return {chr(b): b for b in printable} | {chr(256 + i): b for i, b in enumerate(others)}


BYTE_LEVEL = _byte_level_alphabet()
