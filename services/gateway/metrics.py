"""What the gateway counts, as plain numbers that a scrape reads (shared/metrics.py)."""

import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence

from services.gateway.choices import Piece
from services.gateway.errors import ApiError
from services.gateway.requests import Job
from services.gateway.tally import Tally
from shared.metrics import Buckets, Sample, sample

SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)


class GatewayMetrics:
    """Counters and histograms of this process.

    Args:
        load: (running, waiting) choices at this moment.
    """

    def __init__(self, load: Callable[[], tuple[int, int]]) -> None:
        self._load = load
        self.prompt_tokens = 0
        self.generated_tokens = 0
        self.outcomes: Counter[str] = Counter()
        """Choices by finish reason; ``cancelled`` and ``error`` are requests that ended without one."""
        self.errors: Counter[str] = Counter()
        self.ttft = Buckets(SECONDS)
        self.itl = Buckets(SECONDS)
        self.e2e = Buckets(SECONDS)

    def error(self, error: ApiError) -> None:
        self.errors[error.code or str(error.status)] += 1

    def samples(self) -> Iterable[Sample]:
        running, waiting = self._load()
        yield sample("running", running)
        yield sample("waiting", waiting)
        yield sample("prompt_tokens", self.prompt_tokens)
        yield sample("generated_tokens", self.generated_tokens)
        yield sample("time_to_first_token_seconds", self.ttft)
        yield sample("inter_token_latency_seconds", self.itl)
        yield Sample("e2e_request_latency_seconds", "histogram", "From a request's arrival to its end.", {}, self.e2e)
        for outcome, count in list(self.outcomes.items()):
            yield sample("requests", count, outcome=outcome)
        for code, count in list(self.errors.items()):
            yield sample("refused", count, code=code)


class Timing:
    """Latencies of one request's choices."""

    def __init__(self, metrics: GatewayMetrics, tally: Tally, jobs: Sequence[Job]) -> None:
        self._metrics = metrics
        self._tally = tally
        self._start = time.perf_counter()
        self._last: dict[int, float] = {}
        self._open = {job.index: 0 for job in jobs}
        """Tokens of each choice that has not ended."""
        tally.arrive(len(jobs), sum(len(job.prompt) for job in jobs))

    def piece(self, piece: Piece) -> None:
        """A step that brings several tokens counts as that many equal waits."""
        if piece.tokens:
            self._tokens(piece.index, len(piece.tokens))
        if piece.finish:
            self._metrics.outcomes[piece.finish] += 1
            self._tally.end(self._open.pop(piece.index))

    def _tokens(self, index: int, count: int) -> None:
        now = time.perf_counter()
        if index in self._last:
            wait = (now - self._last[index]) / count
            self._metrics.itl.observe(wait, count)
            self._tally.next(wait, count)
        else:
            self._metrics.ttft.observe(now - self._start)
            self._tally.first(now - self._start, count)
        self._last[index] = now
        self._open[index] += count
        self._metrics.generated_tokens += count

    def end(self) -> None:
        """Of the whole request; choices that have not finished end with it."""
        self._metrics.e2e.observe(time.perf_counter() - self._start)
        for tokens in self._open.values():
            self._tally.end(tokens)
