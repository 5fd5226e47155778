"""What this gateway has served since it told the scheduler last, which sizes the pools by it."""

import asyncio
import time
from collections.abc import Callable

from shared.lifecycle import Instance
from shared.load_messages import WAIT_EDGES, Served, Waits
from shared.metrics import Buckets

TELL_S = 1.0


class Tally:
    """Counts requests (choices) and tokens; ``take`` gives them out and begins anew."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self.open = 0
        self._clock = clock
        self._begin()

    def _begin(self) -> None:
        self._since = self._clock()
        self._arrived = self._prompt_tokens = self._refused = 0
        self._output_tokens = self._ended = self._ended_tokens = 0
        self._inter, self._first = Buckets(WAIT_EDGES), Buckets(WAIT_EDGES)

    def arrive(self, requests: int, prompt_tokens: int) -> None:
        """Requests were let in."""
        self.open += requests
        self._arrived += requests
        self._prompt_tokens += prompt_tokens

    def refuse(self, requests: int, prompt_tokens: int) -> None:
        """Requests were turned away because too many are open: whoever sizes the pools should know that they came."""
        self._arrived += requests
        self._prompt_tokens += prompt_tokens
        self._refused += requests

    def first(self, wait_s: float, tokens: int) -> None:
        """The first tokens of a request were sent."""
        self._output_tokens += tokens
        self._first.observe(wait_s)

    def next(self, wait_s: float, tokens: int) -> None:
        """More tokens of a request were sent, after so many seconds for each."""
        self._output_tokens += tokens
        self._inter.observe(wait_s, tokens)

    def end(self, tokens: int) -> None:
        """A request is over, with so many tokens; one without any was refused, and says nothing of lengths."""
        self.open -= 1
        self._ended += tokens > 0
        self._ended_tokens += tokens

    def take(self, gateway: str, incarnation: int) -> Served:
        """What there was since the last call."""
        served = Served(
            gateway=gateway,
            incarnation=incarnation,
            seconds=self._clock() - self._since,
            arrived=self._arrived,
            prompt_tokens=self._prompt_tokens,
            refused=self._refused,
            output_tokens=self._output_tokens,
            ended=self._ended,
            ended_tokens=self._ended_tokens,
            open=self.open,
            inter=_waits(self._inter),
            first=_waits(self._first),
        )
        self._begin()
        return served


def _waits(times: Buckets) -> Waits:
    return Waits(counts=tuple(times.counts), seconds=times.sum)


async def tell(instance: Instance, tally: Tally) -> None:
    """Publish it once a second, for as long as the instance lives."""
    while not instance.bus.closed:
        await asyncio.sleep(TELL_S)
        await instance.bus.publish(instance.subjects.served, tally.take(instance.id, instance.incarnation))
