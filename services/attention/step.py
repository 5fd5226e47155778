"""One step through the model: rows of many sequences become tensors, then hidden states, then logits.

Knows tensors, the decoder and the exchange; what runs is decided in batching.py, what comes out is used in engine.py.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from services.attention.batching import Chunk
from services.attention.exchange import Exchange
from services.attention.sequence import Trace
from shared.models.decoder import Decoder, KvCache, StepInput
from shared.models.spec import LayerSpec
from shared.pace import UNPACED, Pace
from shared.telemetry import NO_TRACE

T = TypeVar("T")
RECORDED_ROWS = 256
"""Steps of more rows compute for so long that the interpreter does not count."""
MOST_PROGRAMS = 64
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
    """int32 [sequences, most blocks of any of them or more]; shorter rows end in zeros, which nothing reads.

    A power of two of columns, so that steps seldom differ in it.
    """
    ids = [chunk.sequence.table.ids for chunk in chunks]
    tables = np.zeros((len(ids), 1 << (max(map(len, ids)) - 1).bit_length()), dtype=np.int32)
    for row, blocks in zip(tables, ids, strict=True):
        row[: len(blocks)] = blocks
    return tables


class Program:
    """Everything between the exchanges of steps of one shape; recorded as the first of them runs.

    Owns the tensors that hold a step's inputs, since what is recorded reads and writes always the same memory.
    """

    def __init__(self, decoder: Decoder, step: StepInput, record: bool) -> None:
        self.step = step
        self.x, self.rows = decoder.new_rows(len(step.tokens)), decoder.new_rows(len(step.tokens))
        """Residual stream, and what experts read of it: [T, H]."""
        self._record = decoder.kernels.record if record else _as_it_is
        self._calls: list[Callable[[], Any]] = []
        self._next = 0

    def begin(self, step: StepInput) -> None:
        """Take the inputs of another step of this shape."""
        for mine, new in zip(vars(self.step).values(), vars(step).values(), strict=True):
            if mine is not new:
                mine.copy_(new)
        self._next = 0

    def do(self, call: Callable[[], T]) -> T:
        """``call``, or what is recorded of the same one, which is known by its place among all of a step's calls."""
        if self._next == len(self._calls):
            self._calls.append(self._record(call))
        self._next += 1
        return self._calls[self._next - 1]()


def _as_it_is(call: Callable[[], T]) -> Callable[[], T]:
    return call


class ModelRunner:
    """The decoder, its cache and the experts behind the exchange."""

    def __init__(
        self,
        decoder: Decoder,
        cache: KvCache,
        exchange: Exchange,
        block_size: int,
        trace_layers: bool = False,
        pace: Pace = UNPACED,
    ) -> None:
        """``trace_layers``: mark every exchange of a traced request, not only its first."""
        self._decoder = decoder
        self._cache = cache
        self._exchange = exchange
        self._block_size = block_size
        self._pace = pace
        self._trace_layers = trace_layers
        self._programs: dict[tuple[int, ...], Program] = {}

    def forward(self, chunks: Sequence[Chunk]) -> Program:
        """Run one step; its ``x`` is the residual stream after the last layer, valid until the next step.

        Raises ExchangeUnavailable. The cache then holds the rows of some layers; a repeat writes the same again.
        """
        program = self._program(build_step(chunks, self._block_size, self._decoder.device))
        program.do(partial(self._decoder.embed, program.step, program.x))
        trace = self._trace(chunks)
        for layer in self._decoder.spec.layers:
            self._layer(layer, program, trace)
            trace = trace if self._trace_layers or not layer.moe else NO_TRACE
        return program

    def _program(self, step: StepInput) -> Program:
        """The one for this shape, with this step's inputs; long steps do not pay for keeping theirs."""
        shape = (len(step.tokens), *step.tables.shape, len(step.logit_rows))
        if shape[0] > RECORDED_ROWS:
            return Program(self._decoder, step, record=False)
        if shape not in self._programs:
            if len(self._programs) == MOST_PROGRAMS:
                del self._programs[next(iter(self._programs))]
            self._programs[shape] = Program(self._decoder, step, record=True)
        program = self._programs[shape]
        program.begin(step)
        return program

    def _layer(self, layer: LayerSpec, program: Program, trace: Trace) -> None:
        decoder, step, x, rows = self._decoder, program.step, program.x, program.rows
        began = time.monotonic()
        program.do(partial(decoder.attend, layer.index, x, step, self._cache, rows))
        self._pace.attention(began, step.positions)
        if layer.moe:
            handle = self._exchange.dispatch(layer.index, rows, trace)
            began = time.monotonic()
            program.do(partial(decoder.shared, layer.index, rows, x))  # while the experts compute
            self._pace.shared(began, len(rows))
            self._exchange.combine(handle, x)
        else:
            program.do(partial(decoder.dense, layer.index, rows, x))

    def warm_up(self) -> Tensor:
        """Everything of a step but the exchange, on one row at the first slot; returns its residual stream [1, H]."""
        decoder, device = self._decoder, self._decoder.device
        long, short = (torch.zeros(1, dtype=dtype, device=device) for dtype in (torch.int64, torch.int32))
        step = StepInput(long, short, long, short, short.view(1, 1), long)
        x, rows = decoder.new_rows(1), decoder.new_rows(1)
        self._decoder.embed(step, x)
        for layer in self._decoder.spec.layers:
            self._decoder.attend(layer.index, x, step, self._cache, rows)
            (self._decoder.shared if layer.moe else self._decoder.dense)(layer.index, rows, x)
        self._decoder.logits(x, step)
        return x

    def _trace(self, chunks: Sequence[Chunk]) -> Trace:
        """A step has many requests but a frame one trace: the first traced request that is due for it."""
        due = (c.sequence.trace for c in chunks if self._trace_layers or c.first)
        return next((trace for trace in due if trace != NO_TRACE), NO_TRACE)

    def logits(self, done: Program) -> np.ndarray:
        """fp32 [R, vocab] for the rows that the chunks want, in host memory; valid until the next step."""
        began = time.monotonic()
        logits = done.do(partial(self._decoder.logits, done.x, done.step)).cpu().numpy()
        self._pace.head(began, len(logits))
        return logits

    def logits_of(self, done: Program, rows: np.ndarray) -> Iterator[tuple[int, np.ndarray]]:
        """Logits of ``rows`` (int64, of x), some at a time: (index of the first, fp32 [some, vocab])."""
        for first in range(0, len(rows), PROMPT_LOGIT_ROWS):
            began = time.monotonic()
            part = torch.from_numpy(rows[first : first + PROMPT_LOGIT_ROWS]).to(done.x.device)
            logits = self._decoder.logits(done.x, replace(done.step, logit_rows=part)).cpu().numpy()
            self._pace.head(began, len(logits))
            yield first, logits
