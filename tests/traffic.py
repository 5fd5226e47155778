"""Streams that go on while a test changes something: so long as it takes, however fast the machine is."""

import threading
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

from shared.cli.client import stream_completion

LIMIT_S = 120.0


class Traffic:
    """Streams that follow each other on a few connections."""

    def __init__(self, url: str, body: Mapping[str, Any], pool: ThreadPoolExecutor, count: int) -> None:
        self.begun, self.finished = threading.Semaphore(0), threading.Semaphore(0)
        self._url, self._body, self._over = url, body, threading.Event()
        self._running: list[Future[set[str]]] = [pool.submit(self._keep_asking) for _ in range(count)]

    def _keep_asking(self) -> set[str]:
        texts = set()
        while not self._over.is_set():
            pieces = stream_completion(self._url, dict(self._body))
            first = next(pieces)
            self.begun.release()
            texts.add(first + "".join(pieces))
            self.finished.release()
        return texts

    def until_more(self, happened: threading.Semaphore, count: int = 4) -> None:
        """Wait until as many more requests have begun to stream, or have finished. Raises what a stream has raised."""
        while happened.acquire(blocking=False):
            pass
        for _ in range(count):
            while not happened.acquire(timeout=1):
                for running in self._running:
                    assert not running.done(), running.result()

    def stop(self) -> None:
        """Begin no further request."""
        self._over.set()

    def end(self) -> set[str]:
        """Every text that came. Raises what a stream has raised."""
        self.stop()
        return set().union(*(running.result(LIMIT_S) for running in self._running))


@contextmanager
def traffic(url: str, body: Mapping[str, Any], count: int) -> Iterator[Traffic]:
    """``count`` streams of the same completion, until the end or ``Traffic.end``."""
    with ThreadPoolExecutor(count) as pool:
        streams = Traffic(url, body, pool, count)
        try:
            yield streams
        finally:
            streams.stop()
