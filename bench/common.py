"""What the benches share: bars, medians, the JSON on the last line, batches of streamed completions."""

import asyncio
import json
import statistics
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import httpx
import numpy as np

from shared.cli.mesh import LocalMesh
from shared.cli.status import look


@dataclass(frozen=True)
class Bar:
    """One target: ``value`` must be at least (or, with ``at_most``, at most) ``bar``."""

    name: str
    value: float
    bar: float
    at_most: bool = False

    @property
    def ok(self) -> bool:
        return self.value <= self.bar if self.at_most else self.value >= self.bar


def report(name: str, result: dict[str, Any], bars: Iterable[Bar] = ()) -> None:
    """Print the result as one JSON object on the last line of output."""
    rows = [{**asdict(bar), "value": round(bar.value, 4), "ok": bar.ok} for bar in bars]
    print(json.dumps({"bench": name, **result, "bars": rows}), flush=True)


async def refuse_paced(mesh: LocalMesh) -> None:
    """To be called by every bench whose bars claim speed. Raises RuntimeError when a member keeps a profile's times."""
    members, _ = await look(mesh.nats_url, mesh.options.mesh)
    paced = [f"{m.id} by {m.heartbeat.paced}" for m in members if m.heartbeat.paced]
    if paced:
        raise RuntimeError(f"paced instances show a profile's speed, not this machine's: {', '.join(paced)}")


def median(values: Sequence[float]) -> float:
    return float(statistics.median(values))


@dataclass
class Stream:
    """Arrival times of one streamed completion, in seconds of ``time.perf_counter``."""

    started: float
    arrivals: list[float] = field(default_factory=list)
    """One per event; events with several tokens count once per token."""
    tokens: list[int] = field(default_factory=list)

    @property
    def ttft(self) -> float:
        """Time to first token."""
        return self.arrivals[0] - self.started

    @property
    def tpot(self) -> float:
        """Mean time per output token after the first."""
        return (self.arrivals[-1] - self.arrivals[0]) / max(1, len(self.arrivals) - 1)


async def stream_tokens(
    client: httpx.AsyncClient, url: str, prompt: list[int], max_tokens: int, into: Stream | None = None, **more: float
) -> Stream:
    """One streamed completion of token ids, greedy unless ``more`` of the request says otherwise.

    To exactly ``max_tokens`` tokens. ``into``: watched meanwhile.
    """
    always = {"ignore_eos": True, "stream": True, "return_token_ids": True}
    request = {"prompt": prompt, "max_tokens": max_tokens, "temperature": 0, **always, **more}
    stream = into or Stream(0.0)
    stream.started = time.perf_counter()
    async with client.stream("POST", url + "/v1/completions", json=request) as response:
        if response.status_code != 200:
            raise RuntimeError((await response.aread()).decode())
        async for line in lines_of(response):
            if line.startswith("data: {"):
                take_event(stream, json.loads(line[6:]))
    return stream


async def lines_of(response: httpx.Response) -> AsyncIterator[str]:
    """Lines of a stream. httpx itself would split them at every separator of Unicode, also inside of a token's text."""
    rest = b""
    async for chunk in response.aiter_bytes():
        *whole, rest = (rest + chunk).split(b"\n")
        for line in whole:
            yield line.decode()


def take_event(stream: Stream, event: dict[str, Any]) -> None:
    """Add the token ids of one event. Raises RuntimeError for an error event."""
    if "error" in event:
        raise RuntimeError(event["error"]["message"])
    for choice in event["choices"]:
        ids = choice.get("token_ids") or []
        stream.tokens += ids
        stream.arrivals += [time.perf_counter()] * len(ids)


@dataclass(frozen=True)
class Sample:
    """One measured batch: seconds to first token, seconds per output token, output tokens per second."""

    ttft: float
    tpot: float
    rate: float


def prompts(batch: int, length: int, vocab: int, seed: int) -> list[list[int]]:
    """Seeded random token ids [batch, length]."""
    return np.random.default_rng(seed).integers(1, vocab, (batch, length)).tolist()


Ask = Callable[[httpx.AsyncClient, str, list[int], int], Awaitable[Stream]]
"""One streamed completion: (client, URL of the server, token ids, output tokens)."""


async def run_mesh(url: str, ids: list[list[int]], output: int, ask: Ask = stream_tokens) -> Sample:
    """All prompts at once as separate streams; ``ask`` speaks to servers whose API is not the mesh's."""
    limits = httpx.Limits(max_connections=len(ids))
    async with httpx.AsyncClient(timeout=600, limits=limits) as client:
        start = time.perf_counter()
        streams = await asyncio.gather(*(ask(client, url, p, output) for p in ids))
        spent = time.perf_counter() - start
    assert all(len(s.arrivals) == output for s in streams), [len(s.arrivals) for s in streams]
    return Sample(median([s.ttft for s in streams]), median([s.tpot for s in streams]), len(ids) * output / spent)


def medians(samples: list[Sample]) -> dict[str, float]:
    return {
        "ttft_ms": round(median([s.ttft for s in samples]) * 1e3, 1),
        "tpot_ms": round(median([s.tpot for s in samples]) * 1e3, 2),
        "tokens_per_s": round(median([s.rate for s in samples]), 1),
    }
