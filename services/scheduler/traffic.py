"""What gateways have served lately, all of them together: a sliding window. Pure; the caller gives the time.

Reports cover a second each and are added up. How many requests are open is a gateway's latest word, which counts while
it goes on speaking: one that was started again replaces its predecessor, one that is silent has none.
"""

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from shared.load_messages import WAIT_EDGES, Served, Waits

Floats = NDArray[np.float64]
SILENT_S = 5.0
"""A gateway that has said nothing for so long has no open requests any more."""


@dataclass(frozen=True)
class Times:
    """A histogram of waits, in seconds."""

    counts: NDArray[np.int64]
    """[len(WAIT_EDGES) + 1]"""
    seconds: float
    """Their sum."""

    @classmethod
    def of(cls, waits: Sequence[Waits]) -> "Times":
        counts = np.zeros(len(WAIT_EDGES) + 1, np.int64)
        for one in waits:
            counts += one.counts
        return cls(counts, sum(one.seconds for one in waits))

    @property
    def count(self) -> int:
        return int(self.counts.sum())

    @property
    def mean(self) -> float:
        """0 where there was none."""
        return self.seconds / self.count if self.count else 0.0

    def quantile(self, share: float) -> float:
        """The upper edge of the bucket that it lies in, 0 where there was none."""
        if not self.count:
            return 0.0
        at = int(np.searchsorted(np.cumsum(self.counts), share * self.count))
        return WAIT_EDGES[min(at, len(WAIT_EDGES) - 1)]


@dataclass(frozen=True)
class Observed:
    """What was asked and sent in a span of time."""

    seconds: float
    arrived: int
    """Requests, with those that were refused."""
    prompt_tokens: int
    refused: int
    output_tokens: int
    ended: int
    ended_tokens: int
    open: int
    """Requests, now."""
    inter: Times
    """Between two tokens of a request."""
    first: Times
    """From a request's arrival to its first token."""
    known_prompt: float = 1.0
    """Mean tokens of the latest prompts, however long ago they came."""

    @property
    def rate(self) -> float:
        """Requests per second."""
        return self.arrived / self.seconds if self.seconds else 0.0

    @property
    def tokens_per_s(self) -> float:
        return self.output_tokens / self.seconds if self.seconds else 0.0

    @property
    def prompt(self) -> float:
        """Mean tokens of a prompt; at least 1."""
        return max(1.0, self.prompt_tokens / self.arrived if self.arrived else self.known_prompt)

    @property
    def output(self) -> float:
        """Mean tokens of an output, as far as it is known: of those that have ended, else what was sent for each."""
        each, tokens = (self.ended, self.ended_tokens) if self.ended else (self._there, self.output_tokens)
        return max(1.0, tokens / max(1, each))

    @property
    def _there(self) -> int:
        """Requests that tokens were sent for, at least."""
        return max(self.arrived - self.refused, self.open)


@dataclass
class _Gateway:
    incarnation: int
    at: float
    open: int
    past: set[int] = field(default_factory=set)
    """Incarnations that were replaced; what they still say is late."""


class Traffic:
    """Made of ``Served`` messages.

    Args:
        keep_s: nobody asks for longer spans.
        now: clock time of the start, in seconds.
    """

    def __init__(self, keep_s: float, now: float) -> None:
        self._keep_s = keep_s
        self._since = now
        self._busy_at = now
        self._prompt = 1.0
        self._reports: deque[tuple[float, Served]] = deque()
        self._gateways: dict[str, _Gateway] = {}

    def add(self, message: Served, now: float) -> None:
        """Take in what one gateway has served."""
        known = self._gateways.setdefault(message.gateway, _Gateway(message.incarnation, now, 0))
        if message.incarnation in known.past:
            return
        if message.incarnation != known.incarnation:
            known.past.add(known.incarnation)
        known.incarnation, known.at, known.open = message.incarnation, now, message.open
        if message.arrived or message.open:
            self._busy_at = now
        if message.arrived:
            self._prompt = message.prompt_tokens / message.arrived
        self._reports.append((now, message))
        while now - self._reports[0][0] > self._keep_s:
            self._reports.popleft()
        for gone in [id for id, g in self._gateways.items() if now - g.at > max(SILENT_S, self._keep_s)]:
            del self._gateways[gone]

    def idle_s(self, now: float) -> float:
        """For so long no request has come and none was open."""
        return now - self._busy_at

    def known_s(self, now: float) -> float:
        """How far back is known what was served."""
        return min(self._keep_s, now - self._since)

    def seen(self, seconds: float, now: float) -> Observed:
        """The last so many seconds, or what is known of them."""
        span = min(seconds, self.known_s(now))
        reports = [message for at, message in self._reports if now - at < span]

        def total(name: str) -> int:
            return sum(getattr(report, name) for report in reports)

        return Observed(
            seconds=span,
            arrived=total("arrived"),
            prompt_tokens=total("prompt_tokens"),
            refused=total("refused"),
            output_tokens=total("output_tokens"),
            ended=total("ended"),
            ended_tokens=total("ended_tokens"),
            open=sum(g.open for g in self._gateways.values() if now - g.at < SILENT_S),
            inter=Times.of([report.inter for report in reports]),
            first=Times.of([report.first for report in reports]),
            known_prompt=self._prompt,
        )

    def rates(self, window_s: float, count: int, now: float) -> Floats:
        """Requests per second in each of the last ``count`` windows, oldest first; fewer while fewer are known."""
        known = min(count, int(self.known_s(now) // window_s))
        arrived = np.zeros(known)
        for at, report in self._reports:
            window = int((now - at) // window_s)
            if window < known:
                arrived[known - 1 - window] += report.arrived
        return arrived / window_s
