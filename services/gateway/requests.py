"""One choice on its way: what was asked, and the log of tokens that makes it survive an attention instance.

State only, no I/O: router.py moves it.
"""

import asyncio
import uuid
from dataclasses import dataclass, field
from itertools import pairwise

import numpy as np

from shared.request_messages import Decision, FinishReason, SamplingParams, Submit, TokenDelta, TokenLogprobs

PART_TOKENS = 32 * 1024
"""Prompt tokens (4 bytes each) per Submit; leaves most of a message's 512 KiB to the output of a resumed request."""


@dataclass(frozen=True)
class Job:
    """One choice of a request."""

    index: int
    """Number of the choice over all prompts."""
    prompt: list[int]
    sampling: SamplingParams
    stops: tuple[str, ...] = ()
    skip_special: bool = True
    """Special tokens have no text."""
    trace: dict[str, str] = field(default_factory=dict)
    """W3C headers of the request's span."""


@dataclass
class Update:
    """News of one choice, in order and without repeats."""

    tokens: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    """One per token, or none."""
    prompt_logprobs: tuple[TokenLogprobs, ...] = ()
    finish: FinishReason | None = None
    stop_token: int | None = None


class TokenLog:
    """All tokens of one choice by position; repeats are dropped, gaps are noticed.

    Args:
        prompt_logprobs: how many log-probabilities of prompt tokens have to come before the first token.
    """

    def __init__(self, prompt_logprobs: int = 0) -> None:
        self.tokens: list[int] = []
        self.finish: FinishReason | None = None
        self.error: Decision | None = None
        self._prompt_wanted = prompt_logprobs
        self._prompt: list[TokenLogprobs] = []
        self._news = Update()

    def apply(self, delta: TokenDelta) -> bool:
        """Take in a delta. False: something before it is missing, and none of its tokens were taken."""
        if self.finish:
            return True
        if delta.finish == "error":
            self.finish, self.error = delta.finish, delta.error
            return True
        if delta.position > len(self.tokens) or not self._apply_prompt(delta):
            return False
        skip = len(self.tokens) - delta.position
        self.tokens += delta.tokens[skip:]
        self._news.tokens += delta.tokens[skip:]
        self._news.logprobs += delta.logprobs[skip:]
        if delta.finish and delta.position + len(delta.tokens) == len(self.tokens):
            self._end(delta)
        return True

    def take(self) -> Update | None:
        """What came since the last call."""
        news, self._news = self._news, Update()
        return news if news.tokens or news.finish or news.prompt_logprobs else None

    def reopen(self) -> None:
        """Forget an end that was none, because the request goes on elsewhere."""
        self.finish = self.error = None

    def _apply_prompt(self, delta: TokenDelta) -> bool:
        """Prompt log-probabilities may come in several deltas, all of them before the first token and the end."""
        have = len(self._prompt)
        if have < self._prompt_wanted and delta.prompt_start <= have:
            self._prompt += delta.prompt_logprobs[have - delta.prompt_start :]
            if len(self._prompt) == self._prompt_wanted:
                self._news.prompt_logprobs = tuple(self._prompt)
        missing = self._prompt_wanted - len(self._prompt)
        return not missing or (delta.prompt_start <= have and not delta.tokens and not delta.finish)

    def _end(self, delta: TokenDelta) -> None:
        """A cancellation that is not ours is no answer and stays out of the news: the request may go on elsewhere."""
        self.finish = delta.finish
        if delta.finish in ("stop", "length"):
            self._news.finish, self._news.stop_token = delta.finish, delta.stop_token


class OpenRequest:
    """A choice that an attention instance works on, or is about to."""

    def __init__(self, job: Job) -> None:
        self.id = ""
        """On the wire; new for every instance that is tried, so that what an old one still says cannot be mixed up."""
        self.job = job
        self.log = TokenLog(len(job.prompt) if job.sampling.prompt_logprobs >= 0 else 0)
        self.target: str | None = None
        self.incarnation = 0
        self.lost = False
        """The target is gone, or knows nothing of this request."""
        self.gap = False
        self.silence = 0
        """Waits in a row without a word about this request."""
        self.strikes = 0
        """Questions in a row that the target left unanswered."""
        self._changed = asyncio.Event()

    @property
    def outstanding(self) -> int:
        """Tokens that the target still has to compute, at most."""
        done = len(self.log.tokens)
        return max(self.job.sampling.max_tokens - done, 0) + (0 if done else len(self.job.prompt))

    def assign(self, target: str, incarnation: int) -> None:
        self.id = uuid.uuid4().hex
        self.target, self.incarnation = target, incarnation
        self.lost = self.gap = False
        self.silence = self.strikes = 0
        self.log.reopen()

    def receive(self, delta: TokenDelta) -> None:
        self.gap = not self.log.apply(delta)
        self.silence = self.strikes = 0
        self._changed.set()

    def lose(self) -> None:
        self.lost = True
        self._changed.set()

    def suspect_gap(self) -> None:
        """Something may have been missed: ask."""
        self.gap = True
        self._changed.set()

    async def wait(self, seconds: float) -> bool:
        """Until something changed; False after ``seconds`` of silence."""
        try:
            async with asyncio.timeout(seconds):
                await self._changed.wait()
        except TimeoutError:
            return False
        self._changed.clear()
        return True

    def submits(self, gateway: str, deadline_s: float, may_wait: bool) -> list[Submit]:
        """The messages that hand this request, with all it has so far, to an instance.

        ``may_wait``: for experts, if there are none.
        """
        prompt = self.job.prompt
        edges = [*range(0, len(prompt), PART_TOKENS), len(prompt)]
        parts = [_packed(prompt[a:b]) for a, b in pairwise(edges)]
        output = _packed(self.log.tokens)
        return [
            Submit(
                request_id=self.id,
                gateway=gateway,
                prompt=data,
                sampling=self.job.sampling,
                deadline_s=deadline_s,
                output=output if i == len(parts) - 1 else b"",
                part=i,
                parts=len(parts),
                may_wait=may_wait,
                trace=self.job.trace,
            )
            for i, data in enumerate(parts)
        ]


def _packed(tokens: list[int]) -> bytes:
    """int32 little-endian."""
    return np.asarray(tokens, dtype="<i4").tobytes()
