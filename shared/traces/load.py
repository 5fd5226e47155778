"""Open a routing trace of any kind by its content, and read all of it with a warning where it is polluted."""

import logging
from collections.abc import Iterator
from pathlib import Path

from shared.traces.foreign import read_megatron, read_vllm
from shared.traces.native import is_native, read_native
from shared.traces.records import Exchange, dominant_row

log = logging.getLogger(__name__)


def open_trace(path: Path) -> Iterator[Exchange]:
    """The exchanges of our own file, of Megatron-core's JSONL or of vLLM's array, one by one. Raises BadTrace."""
    if is_native(path):
        return read_native(path)
    with path.open("rb") as file:
        first = file.read(64).lstrip()
    return read_megatron(path) if first.startswith(b"{") else read_vllm(path)


def load_trace(path: Path) -> list[Exchange]:
    """All exchanges. Logs a warning when one identical row dominates a layer. Raises BadTrace."""
    exchanges = list(open_trace(path))
    if warning := dominant_row(exchanges):
        log.warning("%s: %s", path, warning)
    return exchanges
