"""A routing trace of real text: the embedded demo model continues the paragraphs of our own pages, and is recorded."""

import asyncio
from functools import partial
from itertools import cycle, islice
from pathlib import Path

from common import run_mesh, stream_tokens
from tokenizers import Tokenizer

from shared.cli.mesh import LocalMesh, MeshOptions
from shared.models.source import open_source
from shared.traces.recorder import Limits, Recorder, record

PAGES = Path(__file__).parents[1]
MESH = "bench-trace"
BATCHES, OUTPUT = (4, 16, 48), 24
"""Streams at a time, and tokens that each of them generates."""
SHORTEST, LONGEST = 8, 96
"""Tokens of a paragraph that is used, and where it is cut."""


def paragraphs() -> list[list[int]]:
    """Token ids of the prose in README.md and docs, in the demo model's vocabulary."""
    tokenizer = Tokenizer.from_file(str(open_source("").tokenizer_file))
    pages = [PAGES / "README.md", *sorted((PAGES / "docs").glob("*.md"))]
    texts = (text for page in pages for text in page.read_text("utf-8").split("\n\n"))
    ids = (tokenizer.encode(text, add_special_tokens=False).ids[:LONGEST] for text in texts)
    return [prompt for prompt in ids if len(prompt) >= SHORTEST]


async def record_demo(out: Path) -> Recorder:
    """Write a trace of all of BATCHES to ``out``. Raises CannotRecord and what starting a mesh raises."""
    stop, begun = asyncio.Event(), asyncio.Event()
    options = MeshOptions(port=0, mesh=MESH, settings={"prefix_cache": "false"})
    async with LocalMesh(options) as mesh:
        recording = asyncio.create_task(
            record(mesh.nats_url, MESH, out, stop, Limits(), lambda r: begun.set() if r.sources else None)
        )
        first = asyncio.create_task(begun.wait())
        await asyncio.wait({recording, first}, return_when=asyncio.FIRST_COMPLETED)
        first.cancel()
        if not recording.done():
            await speak(mesh.url)
        stop.set()
        return await recording


async def speak(url: str) -> None:
    """Paragraphs in turns, continued at a temperature at which texts do not repeat themselves."""
    texts = cycle(paragraphs())
    for batch in BATCHES:
        await run_mesh(url, list(islice(texts, batch)), OUTPUT, partial(stream_tokens, temperature=0.8, seed=batch))
