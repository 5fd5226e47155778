"""One step through the model: rows of many sequences become tensors, then hidden states, then logits.

Knows tensors, the decoder and the exchange; what runs is decided in batching.py, what comes out is used in engine.py.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from services.attention.batching import Chunk, prefills
from services.attention.exchange import Exchange, Handle, Score
from services.attention.micro_batches import MicroBatching, split
from services.attention.sequence import Trace
from shared.errors import ExchangeUnavailable
from shared.kernels.recorder import Recording
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
        self._score: Score | None = None
        self._scored = False

    def begin(self, step: StepInput) -> None:
        """Take the inputs of another step of this shape."""
        for mine, new in zip(vars(self.step).values(), vars(step).values(), strict=True):
            if mine is not new:
                mine.copy_(new)
        self._next = 0

    def score(self, layers: Sequence[LayerSpec]) -> Score | None:
        """All calls between embedding and head; None where they are not recorded (yet)."""
        if not self._scored and len(self._calls) > 2 * len(layers):
            self._scored, calls = True, self._calls[1 : 2 * len(layers) + 1]
            recorded = [call for call in calls if isinstance(call, Recording)]
            self._score = Score.of([call.where for call in recorded], layers) if len(recorded) == len(calls) else None
        return self._score

    def at(self, calls: int) -> None:
        """So many calls of the score have been made."""
        self._next = 1 + calls

    def do(self, call: Callable[[], T]) -> T:
        """``call``, or what is recorded of the same one, which is known by its place among all of a step's calls."""
        if self._next == len(self._calls):
            self._calls.append(self._record(call))
        self._next += 1
        return self._calls[self._next - 1]()


def _as_it_is(call: Callable[[], T]) -> Callable[[], T]:
    return call


@dataclass
class MicroBatch:
    """Rows of a step that go through the layers together, and their open exchange."""

    program: Program
    trace: Trace
    shared: Callable[[], None] | None = None
    """The shared experts' part of the layer whose exchange is open."""
    handle: Handle | None = None


class ModelRunner:
    """The decoder, its cache and the experts behind the exchange."""

    def __init__(
        self,
        decoder: Decoder,
        cache: KvCache,
        exchange: Exchange,
        block_size: int,
        trace_layers: bool = False,
        micro_batching: MicroBatching | None = None,
        pace: Pace = UNPACED,
    ) -> None:
        """``trace_layers``: mark every exchange of a traced request, not only its first."""
        self._decoder = decoder
        self._cache = cache
        self._exchange = exchange
        self._block_size = block_size
        self._pace = pace
        self._trace_layers = trace_layers
        self._micro_batching = micro_batching or MicroBatching(fixed=1)
        self._programs: dict[tuple[int, ...], Program] = {}
        self.split_steps = 0
        """How many steps had more than one micro-batch."""

    def forward(self, chunks: Sequence[Chunk]) -> list[MicroBatch]:
        """Run one step. The results are valid until the next one.

        Raises ExchangeUnavailable. The cache then holds the rows of some layers; a repeat writes the same again.
        """
        rows, start = sum(chunk.count for chunk in chunks), time.perf_counter()
        together = self._exchange.begin(rows, prefills(chunks))
        count = 1 if together else self._micro_batching.count(rows)
        try:
            batches = [self._begin(index, part) for index, part in enumerate(split(chunks, count))]
            self._layers(batches)
            for batch in batches:
                self._end_exchange(batch)
        except ExchangeUnavailable:
            self._exchange.abandon()
            raise
        finally:
            self._exchange.end()
        if not together:
            self._micro_batching.observe(rows, count, time.perf_counter() - start)
        self.split_steps += len(batches) > 1
        return batches

    def _layers(self, batches: Sequence[MicroBatch]) -> None:
        layers, index = self._decoder.spec.layers, 0
        while index < len(layers):
            for batch in batches:
                self._end_exchange(batch)
            went = self._march(batches[0], index) if len(batches) == 1 else index
            if went == index:
                went += 1
                for batch in batches:
                    self._layer(layers[index], batch)
            index = went

    def _march(self, batch: MicroBatch, first: int) -> int:
        """Layers from ``first`` on without the interpreter, as far as that goes; returns which one is next.

        The exchange of the one before it may be open then.
        """
        program, layers = batch.program, self._decoder.spec.layers
        score = program.score(layers) if batch.trace == NO_TRACE and self._pace is UNPACED else None
        halt = self._exchange.march(score, 2 * first, program.rows, program.x) if score else None
        if halt is None:
            return first
        program.at(halt.calls)
        batch.handle, batch.shared = halt.handle, None
        if halt.calls % 2:
            self._dispatch(layers[halt.calls // 2], batch)
        return (halt.calls + 1) // 2

    def _begin(self, index: int, chunks: Sequence[Chunk]) -> MicroBatch:
        program = self._program(index, build_step(chunks, self._block_size, self._decoder.device))
        program.do(partial(self._decoder.embed, program.step, program.x))
        return MicroBatch(program, self._trace(chunks))

    def _program(self, index: int, step: StepInput) -> Program:
        """That of the micro-batch ``index`` for this shape, with this step's inputs; long steps do not keep theirs."""
        shape = (index, len(step.tokens), *step.tables.shape, len(step.logit_rows))
        if len(step.tokens) > RECORDED_ROWS:
            return Program(self._decoder, step, record=False)
        program = self._programs.pop(shape, None) or Program(self._decoder, step, record=True)
        if len(self._programs) == MOST_PROGRAMS:
            del self._programs[next(iter(self._programs))]  # the one that was not used for longest
        self._programs[shape] = program
        program.begin(step)
        return program

    def _layer(self, layer: LayerSpec, batch: MicroBatch) -> None:
        """Up to the dispatch of a layer with experts."""
        decoder, program = self._decoder, batch.program
        step, x, rows = program.step, program.x, program.rows
        began = time.monotonic()
        program.do(partial(decoder.attend, layer.index, x, step, self._cache, rows))
        self._pace.attention(began, step.positions)
        if layer.moe:
            self._dispatch(layer, batch)
        else:
            program.do(partial(decoder.dense, layer.index, rows, x))

    def _dispatch(self, layer: LayerSpec, batch: MicroBatch) -> None:
        rows = batch.program.rows
        batch.handle = self._exchange.dispatch(layer.index, rows, batch.trace)
        batch.shared = partial(self._decoder.shared, layer.index, rows, batch.program.x)
        batch.trace = batch.trace if self._trace_layers else NO_TRACE

    def _end_exchange(self, batch: MicroBatch) -> None:
        """The shared experts, while the others compute, then the sum of both."""
        if batch.handle is None:
            return
        if batch.shared:
            began = time.monotonic()
            batch.program.do(batch.shared)
            self._pace.shared(began, len(batch.program.rows))
        self._exchange.combine(batch.handle, batch.program.x)
        batch.handle = batch.shared = None

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

    def logits(self, done: Sequence[MicroBatch]) -> np.ndarray:
        """fp32 [R, vocab] for the rows that the chunks want, in host memory; valid until the next step."""
        began = time.monotonic()
        programs = [batch.program for batch in done]
        parts = (p.do(partial(self._decoder.logits, p.x, p.step)).cpu().numpy() for p in programs)
        logits = next(parts) if len(programs) == 1 else np.concatenate([part.copy() for part in parts])
        self._pace.head(began, len(logits))
        return logits

    def logits_of(self, done: Sequence[MicroBatch], rows: np.ndarray) -> Iterator[tuple[int, np.ndarray]]:
        """Logits of ``rows`` (int64, ascending), some at a time: (index of the first, fp32 [some, vocab])."""
        offset = 0
        for program in (batch.program for batch in done):
            first, end = np.searchsorted(rows, (offset, offset + len(program.x))).tolist()
            for start in range(first, end, PROMPT_LOGIT_ROWS):
                part = torch.from_numpy(rows[start : min(start + PROMPT_LOGIT_ROWS, end)] - offset)
                step = replace(program.step, logit_rows=part.to(program.x.device))
                began = time.monotonic()
                logits = self._decoder.logits(program.x, step).cpu().numpy()
                self._pace.head(began, len(logits))
                yield start, logits
            offset += len(program.x)
