"""What both endpoints' answers share: identity, usage, and how chunks make a whole.

A plain answer is the fold of the chunks that a stream would have had. What a choice looks like is in completions.py
and chats.py.
"""

import time
import uuid
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from services.gateway.choices import Piece
from services.gateway.protocol import Sampling
from services.gateway.served import ServedModel

R = TypeVar("R", bound=Sampling)
Json = dict[str, Any]


@dataclass(frozen=True)
class Prompt:
    ids: list[int]
    text: str | None = None
    """As the client wrote it; None when it came as token ids."""


class Answer(ABC, Generic[R]):
    """The answer to one request, made piece by piece."""

    prefix: str
    chunk_object: str
    whole_object: str

    def __init__(self, request: R, model: ServedModel, prompts: list[Prompt]) -> None:
        self.request = request
        self.model = model
        self.prompts = prompts
        self.id = f"{self.prefix}-{uuid.uuid4().hex}"
        self.created = int(time.time())
        self.completion_tokens = 0
        self._begun: set[int] = set()
        options = request.stream_options
        self.include_usage = bool(options and options.include_usage)
        self.continuous_usage = bool(options and options.continuous_usage_stats)

    # ---- one endpoint's format ----------------------------------------------------------------------------

    @abstractmethod
    def pieces(self, piece: Piece, first: bool) -> list[Json]:
        """Chunk choices for a piece; ``first``: the first one of this choice."""

    @abstractmethod
    def fold(self, choices: list[Json]) -> Json:
        """All chunk choices of one index as one choice of a plain answer."""

    def extras(self) -> Json:
        """Further top-level fields of the first chunk and of the whole."""
        return {}

    # ---- stream and whole ---------------------------------------------------------------------------------

    def chunks(self, piece: Piece) -> list[Json]:
        """The events for a piece; none when it shows nothing yet."""
        extras = self.extras() if not self._begun else {}
        usage = {"usage": self.usage()} if self.continuous_usage else {"usage": None}
        shown = usage if self.include_usage or self.continuous_usage else {}
        return [self._top(self.chunk_object, [c]) | shown | extras for c in self.take(piece)]

    def take(self, piece: Piece) -> list[Json]:
        """Count a piece and return its chunk choices."""
        first = piece.index not in self._begun
        self._begun.add(piece.index)
        self.completion_tokens += len(piece.tokens)
        return self.pieces(piece, first)

    def usage_chunk(self) -> Json:
        return self._top(self.chunk_object, []) | {"usage": self.usage()}

    def whole(self, choices: list[Json]) -> Json:
        """The plain answer from all chunk choices, in any interleaving."""
        by_index: dict[int, list[Json]] = {}
        for choice in choices:
            by_index.setdefault(choice["index"], []).append(choice)
        folded = [self.fold(by_index[index]) for index in sorted(by_index)]
        return self._top(self.whole_object, folded) | {"usage": self.usage()} | self.extras()

    def usage(self) -> Json:
        """A prompt counts once, however many choices it has."""
        prompt = sum(len(p.ids) for p in self.prompts)
        return {
            "prompt_tokens": prompt,
            "completion_tokens": self.completion_tokens,
            "total_tokens": prompt + self.completion_tokens,
        }

    def prompt_of(self, index: int) -> Prompt:
        """Choices are numbered across prompts."""
        return self.prompts[index // self.request.choices]

    def visible(self, piece: Piece, first: bool) -> bool:
        """Whether a chunk with this piece says anything."""
        return bool(piece.text or piece.finish or (piece.tokens and self._reports_tokens()))

    def token_ids(self, piece: Piece) -> Json:
        return {"token_ids": piece.tokens} if self.request.return_token_ids else {}

    def _reports_tokens(self) -> bool:
        logprobs = getattr(self.request, "logprobs", None)
        return bool(self.request.return_token_ids or (logprobs is not None and logprobs is not False))

    def _top(self, object: str, choices: list[Json]) -> Json:
        return {
            "id": self.id,
            "object": object,
            "created": self.created,
            "model": self.model.name,
            "system_fingerprint": self.model.fingerprint,
            "choices": choices,
        }


def joined(choices: list[Json], field: str) -> list[Any]:
    """A list field of several chunk choices, one after the other."""
    return [item for choice in choices for item in choice.get(field, ())]
