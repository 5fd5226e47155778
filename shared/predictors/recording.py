"""What gates read and choose while a model reads text: one process, passage by passage, in bounded memory.

A passage is a run of tokens with nothing before it, so that rows do not depend on how many texts are read.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from tokenizers import Tokenizer
from torch import Tensor

from shared.errors import MoemeshError
from shared.kernels.base import select_kernels
from shared.models.decoder import StepInput
from shared.models.loader import Checkpoint
from shared.models.local import LocalModel
from shared.models.precision import choose_precision

CONTEXT = 512
"""Tokens of a passage."""
_PIECE = 1 << 16
"""Characters that are tokenized at a time; a tokenizer keeps some hundred bytes for each token of a call."""
_BLOCK = 16
OVERLAP = 32
"""Texts overlap when they have so many tokens in a row in common."""


@dataclass(frozen=True, eq=False)
class Passage:
    """By checkpoint index of a layer with experts; valid until the next passage."""

    rows: dict[int, NDArray[np.float32]]
    """[T, H]: what its gate has read."""
    ids: dict[int, NDArray[np.int32]]
    """[T, k]: what it has chosen."""

    def cut(self, first: int, last: int) -> "Passage":
        """Rows ``first`` to ``last`` - 1."""
        rows = {layer: array[first:last] for layer, array in self.rows.items()}
        return Passage(rows, {layer: array[first:last] for layer, array in self.ids.items()})

    def __len__(self) -> int:
        return len(next(iter(self.ids.values())))


def batches(passages: Iterable[Passage], size: int, whole: bool = True) -> Iterator[Passage]:
    """The rows of passages in batches of ``size``, in order. ``whole``: without a smaller one at a passage's end."""
    for passage in passages:
        for first in range(0, len(passage) - (size - 1 if whole else 0), size):
            yield passage.cut(first, first + size)


class Reader:
    """A model that reads passages; on CPU, with the precision that it is served with by default."""

    def __init__(self, checkpoint: Checkpoint, context: int = CONTEXT, threads: int = 0) -> None:
        """``context``: most tokens of a passage; ``threads``: 0 = all. Raises ModelError."""
        cpu = torch.device("cpu")
        precision = choose_precision("auto", cpu, checkpoint)
        kernels = select_kernels(cpu, threads, precision.precise)
        self._model = LocalModel(checkpoint, kernels, cpu, precision.tensors, context, self._watch)
        blocks = -(-context // _BLOCK)
        self._cache = self._model.decoder.new_cache(blocks, _BLOCK)
        self._tables = torch.arange(blocks, dtype=torch.int32).view(1, -1)
        self._rows: dict[int, NDArray[np.float32]] = {}
        self._ids: dict[int, NDArray[np.int32]] = {}

    def read(self, tokens: NDArray[np.int32]) -> Passage:
        """One pass over tokens [T]."""
        positions = torch.arange(len(tokens))
        step = StepInput(
            torch.from_numpy(tokens).long(), positions.int(), positions, torch.zeros(len(tokens), dtype=torch.int32),
            self._tables, positions[:1],
        )  # fmt: skip
        with torch.inference_mode():
            self._model.forward(step, self._cache)
        return Passage(dict(self._rows), dict(self._ids))

    def _watch(self, layer: int, rows: Tensor, ids: NDArray[np.int32]) -> None:
        self._rows[layer], self._ids[layer] = rows.float().numpy().copy(), ids.copy()


def tokens_of(text: Path, tokenizer: Tokenizer) -> NDArray[np.int32]:
    """Token ids of a file. Raises MoemeshError when it cannot be read as UTF-8."""
    try:
        content = text.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise MoemeshError(f"{text}: cannot be read as text ({error})") from error
    encoded = [tokenizer.encode(piece, add_special_tokens=False).ids for piece in _pieces(content)]
    return np.array([token for ids in encoded for token in ids], np.int32)


def passages_of(
    texts: Sequence[Path], tokenizer: Tokenizer, context: int, rows: int = 0, without: Sequence[Path] = ()
) -> list[NDArray[np.int32]]:
    """Tokens of whole passages, in the order of the texts.

    Args:
        rows: about so many in all, spread evenly over each text, with an equal share of every text; 0: all there are.
        without: texts with which no passage may overlap (see OVERLAP): those that a result is to be judged by.
    """
    barred = np.unique(np.concatenate([[0], *(_runs(tokens_of(text, tokenizer)) for text in without)]))
    share, chosen = rows // context // max(1, len(texts)), []
    for text in texts:
        tokens = tokens_of(text, tokenizer)
        cut = [tokens[first : first + context] for first in range(0, len(tokens) - context + 1, context)]
        cut = [passage for passage in cut if not np.isin(_runs(passage), barred).any()] if without else cut
        some = np.linspace(0, len(cut) - 1, share).astype(int) if 0 < share < len(cut) else range(len(cut))
        chosen += [cut[number] for number in some]
    if not chosen:
        raise MoemeshError(f"{', '.join(map(str, texts))}: no passage of {context} tokens is left to be read")
    return chosen


def _pieces(content: str) -> Iterator[str]:
    """Cut at ends of lines, where tokens of a byte-level tokenizer end too."""
    while content:
        end = content.find("\n", _PIECE) + 1 or len(content)
        yield content[:end]
        content = content[end:]


def _runs(tokens: NDArray[np.int32]) -> NDArray[np.uint64]:
    """A hash of every OVERLAP tokens in a row, uint64: polynomial, modulo 2**64."""
    if len(tokens) < OVERLAP:
        return np.empty(0, np.uint64)
    powers = np.array([pow(0x9E3779B97F4A7C15, n, 1 << 64) for n in range(OVERLAP)], np.uint64)
    return np.lib.stride_tricks.sliding_window_view(tokens.astype(np.uint64) + np.uint64(1), OVERLAP) @ powers
