"""Traffic for the elastic benches: streams that continue held-out text, again and again; and what instances count."""

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import httpx
import numpy as np
from common import Stream, stream_tokens
from tokenizers import Tokenizer

from shared.cli.mesh import LocalMesh
from shared.cli.status import look
from shared.messages import ElasticFacts
from shared.models.source import open_source

PROMPT, OUTPUT = 32, 96
"""Tokens of a request. Texts are cut anywhere, and continued at a temperature at which they do not loop."""
TEMPERATURE = 0.8


def text_ids(path: Path) -> list[int]:
    """Token ids of a text in the demo model's vocabulary."""
    tokenizer = Tokenizer.from_file(str(open_source("").tokenizer_file))
    return tokenizer.encode(path.read_text("utf-8"), add_special_tokens=False).ids


@dataclass
class Counts:
    """What the expert instances of a mesh have counted together."""

    calls: int = 0
    waits: int = 0
    warm: int = 0
    cold: int = 0

    def __sub__(self, before: "Counts") -> "Counts":
        return Counts(*(a - b for a, b in zip(self.values(), before.values(), strict=True)))

    def values(self) -> tuple[int, ...]:
        return self.calls, self.waits, self.warm, self.cold

    @property
    def share(self) -> float:
        """Of the calls that waited."""
        return self.waits / max(1, self.calls)


async def counts(mesh: LocalMesh) -> Counts:
    """As of their last heartbeats, which are at most a second old."""
    members, _ = await look(mesh.nats_url, mesh.options.mesh)
    facts = [m.heartbeat.experts.elastic for m in members if m.heartbeat.experts]
    found: list[ElasticFacts] = [fact for fact in facts if fact]
    assert len(found) == mesh.options.experts, "not all expert instances are elastic"
    return Counts(*(sum(getattr(fact, name) for fact in found) for name in ("calls", "waits", "warm", "cold")))


async def converse(
    client: httpx.AsyncClient,
    url: str,
    text: Callable[[], Sequence[int]],
    streams: int,
    more: Callable[[], bool],
    seed: int,
) -> list[Stream]:
    """``streams`` requests at a time that continue places of ``text()``, while ``more()``. Returns all of them."""
    done: list[Stream] = []

    async def one(number: int) -> None:
        rng = np.random.default_rng([seed, number])
        while more():
            ids = text()
            start = int(rng.integers(len(ids) - PROMPT))
            stream = Stream(0.0)
            done.append(stream)
            sampling = {"temperature": TEMPERATURE, "seed": int(rng.integers(1 << 31))}
            await stream_tokens(client, url, list(ids[start : start + PROMPT]), OUTPUT, stream, **sampling)

    await asyncio.gather(*(one(number) for number in range(streams)))
    return done
