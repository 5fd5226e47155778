"""One step through the model: rows of many sequences become tensors, then hidden states, then logits.

Knows tensors, the decoder and the exchange; what runs is decided in batching.py, what comes out is used in engine.py.
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from services.attention.batching import Chunk
from services.attention.exchange import Exchange
from services.attention.sequence import Trace
from shared.models.decoder import Decoder, KvCache, StepInput
from shared.telemetry import NO_TRACE

PROMPT_LOGIT_ROWS = 64
"""Most rows of logits that are made at once for prompt log-probabilities: bounds the memory."""


def build_step(chunks: Sequence[Chunk], block_size: int, device: torch.device) -> StepInput:
    """All rows of ``chunks``, in order; logits are wanted for the last row of each complete chunk."""
    starts = np.array([chunk.start for chunk in chunks])
    counts = np.array([chunk.count for chunk in chunks])
    ends = np.cumsum(counts)
    sequence = np.repeat(np.arange(len(chunks), dtype=np.int32), counts)
    positions = np.arange(ends[-1]) + np.repeat(starts - (ends - counts), counts)
    tables = _tables(chunks)
    slots = tables[sequence, positions // block_size].astype(np.int64) * block_size + positions % block_size
    tokens = np.concatenate([chunk.sequence.tokens[chunk.start : chunk.start + chunk.count] for chunk in chunks])
    last = (ends - 1)[[chunk.complete for chunk in chunks]].astype(np.int64)
    arrays = (tokens.astype(np.int64), positions.astype(np.int32), slots, sequence, tables, last)
    return StepInput(*(torch.from_numpy(array).to(device) for array in arrays))


def _tables(chunks: Sequence[Chunk]) -> np.ndarray:
    """int32 [sequences, most blocks of any of them]; shorter rows end in zeros, which nothing reads."""
    ids = [chunk.sequence.table.ids for chunk in chunks]
    tables = np.zeros((len(ids), max(map(len, ids))), dtype=np.int32)
    for row, blocks in zip(tables, ids, strict=True):
        row[: len(blocks)] = blocks
    return tables


class ModelRunner:
    """The decoder, its cache and the experts behind the exchange."""

    def __init__(
        self, decoder: Decoder, cache: KvCache, exchange: Exchange, block_size: int, trace_layers: bool = False
    ) -> None:
        """``trace_layers``: mark every exchange of a traced request, not only its first."""
        self._decoder = decoder
        self._cache = cache
        self._exchange = exchange
        self._block_size = block_size
        self._trace_layers = trace_layers

    def forward(self, chunks: Sequence[Chunk]) -> tuple[StepInput, Tensor]:
        """The step and its residual stream [T, H] after the last layer.

        Raises ExchangeUnavailable. The cache then holds the rows of some layers; a repeat writes the same again.
        """
        step = build_step(chunks, self._block_size, self._decoder.device)
        x = self._decoder.embed(step)
        trace = self._trace(chunks)
        for layer in self._decoder.spec.layers:
            if layer.moe:
                staged = self._exchange.stage(len(x))
                self._decoder.attend(layer.index, x, step, self._cache, staged.rows)
                handle = self._exchange.dispatch(layer.index, staged, trace)
                self._decoder.shared(layer.index, staged.rows, x)  # while the experts compute
                self._exchange.combine(handle, x)
                trace = trace if self._trace_layers else NO_TRACE
            else:
                rows = torch.empty_like(x)
                self._decoder.attend(layer.index, x, step, self._cache, rows)
                self._decoder.dense(layer.index, rows, x)
        return step, x

    def warm_up(self) -> Tensor:
        """Everything of a step but the exchange, on one row at the first slot; returns its residual stream [1, H]."""
        device = self._decoder.device
        long, short = (torch.zeros(1, dtype=dtype, device=device) for dtype in (torch.int64, torch.int32))
        step = StepInput(long, short, long, short, short.view(1, 1), long)
        x = self._decoder.embed(step)
        for layer in self._decoder.spec.layers:
            rows = torch.empty_like(x)
            self._decoder.attend(layer.index, x, step, self._cache, rows)
            (self._decoder.shared if layer.moe else self._decoder.dense)(layer.index, rows, x)
        self._decoder.logits(x, step)
        return x

    def _trace(self, chunks: Sequence[Chunk]) -> Trace:
        """A step has many requests but a frame one trace: the first traced request that is due for it."""
        due = (c.sequence.trace for c in chunks if self._trace_layers or c.start == 0)
        return next((trace for trace in due if trace != NO_TRACE), NO_TRACE)

    def logits(self, step: StepInput, x: Tensor) -> np.ndarray:
        """fp32 [R, vocab] for the wanted rows, in host memory."""
        return self._decoder.logits(x, step).cpu().numpy()

    def logits_of(self, step: StepInput, x: Tensor, rows: np.ndarray) -> Iterator[tuple[int, np.ndarray]]:
        """Logits of ``rows`` (int64, of x), some at a time: (index of the first, fp32 [some, vocab])."""
        for first in range(0, len(rows), PROMPT_LOGIT_ROWS):
            part = torch.from_numpy(rows[first : first + PROMPT_LOGIT_ROWS]).to(x.device)
            yield first, self.logits(replace(step, logit_rows=part), x)
