"""One choice from tokens to pieces that a client may see, and all choices of a request as one stream of pieces.

The same pieces make a stream's chunks and a plain answer, so the two cannot differ. Formats are in completions.py and
chats.py.
"""

import asyncio
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from functools import partial

from services.gateway.errors import ApiError
from services.gateway.requests import Job, Update
from services.gateway.router import Router
from services.gateway.text import OutputText
from services.gateway.tokenizer import Tokenizer
from shared.request_messages import TokenLogprobs


@dataclass
class Piece:
    """What one update adds to a choice."""

    index: int
    text: str = ""
    tokens: list[int] = field(default_factory=list)
    offsets: list[int] = field(default_factory=list)
    """Per token: characters of the output before it."""
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    prompt_logprobs: tuple[TokenLogprobs, ...] = ()
    finish: str | None = None
    """``stop`` or ``length``."""
    stop_reason: str | int | None = None
    """The stop string or stop token that ended the choice, unless it was an end-of-sequence token."""


class Choice:
    """Turns the updates of one choice into pieces. Pure.

    Args:
        eos: stop tokens that are the model's own and not worth naming in ``stop_reason``.
    """

    def __init__(self, job: Job, tokenizer: Tokenizer, eos: Sequence[int]) -> None:
        self._index = job.index
        self._eos = eos
        self._text = OutputText(tokenizer.detokenizer(job.prompt, job.skip_special), job.stops, job.sampling.min_tokens)

    def feed(self, update: Update) -> Piece:
        piece = Piece(self._index, prompt_logprobs=update.prompt_logprobs)
        for i, token in enumerate(update.tokens):
            silent = update.stop_token is not None and i == len(update.tokens) - 1
            self._add(piece, token, update.logprobs[i : i + 1], silent)
            if self._text.stopped is not None:
                break
        if self._text.stopped is None and update.finish:
            piece.text += self._text.finish()
            self._end(piece, update)
        if self._text.stopped is not None:
            piece.finish, piece.stop_reason = "stop", self._text.stopped
        return piece

    def _add(self, piece: Piece, token: int, logprobs: list[TokenLogprobs], silent: bool) -> None:
        piece.offsets.append(self._text.length)
        piece.tokens.append(token)
        piece.logprobs += logprobs
        if not silent:
            piece.text += self._text.push(token)

    def _end(self, piece: Piece, update: Update) -> None:
        piece.finish = update.finish
        if update.stop_token is not None and update.stop_token not in self._eos:
            piece.stop_reason = update.stop_token


class Choices:
    """Runs all choices of a request at once and merges their pieces as they come."""

    def __init__(self, router: Router, tokenizer: Tokenizer, eos: Sequence[int]) -> None:
        self._router = router
        self._tokenizer = tokenizer
        self._eos = eos
        self._open: set[asyncio.Queue[Piece | BaseException]] = set()

    def end_all(self, error: ApiError) -> None:
        """End every request that is running with ``error``."""
        for pieces in self._open:
            pieces.put_nowait(error)

    async def run(self, jobs: Sequence[Job], deadline: float) -> AsyncGenerator[Piece, None]:
        """Pieces of all jobs; ends when every choice has finished. Closing it early cancels them all.

        Args:
            deadline: loop time at which a request that is still running fails.

        Raises ApiError, Refused or BusUnavailable: the first failure of any choice ends the request.
        """
        pieces: asyncio.Queue[Piece | BaseException] = asyncio.Queue()
        tasks = [asyncio.create_task(self._pump(job, deadline, pieces)) for job in jobs]
        for task in tasks:
            task.add_done_callback(partial(_report, pieces))
        left = len(tasks)
        self._open.add(pieces)
        try:
            while left:
                piece = await pieces.get()
                if not isinstance(piece, Piece):
                    raise piece
                left -= piece.finish is not None
                yield piece
        finally:
            self._open.discard(pieces)
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _pump(self, job: Job, deadline: float, out: asyncio.Queue[Piece | BaseException]) -> None:
        choice = Choice(job, self._tokenizer, self._eos)
        try:
            async with asyncio.timeout_at(deadline), aclosing(self._router.run(job, deadline)) as updates:
                async for update in updates:
                    piece = choice.feed(update)
                    out.put_nowait(piece)
                    if piece.finish:
                        return
        except TimeoutError as error:
            raise ApiError(504, "the request took longer than the server allows", None, "deadline") from error


def _report(out: asyncio.Queue[Piece | BaseException], task: asyncio.Task[None]) -> None:
    """A choice that failed, for whatever reason, ends the request."""
    if not task.cancelled() and (error := task.exception()):
        out.put_nowait(error)
