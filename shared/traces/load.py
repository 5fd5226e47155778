"""Open a routing trace of any kind by its content, and read all of it with a warning where it is polluted."""

import logging
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Literal

from shared.traces.foreign import read_megatron, read_vllm
from shared.traces.native import is_native, read_native
from shared.traces.records import Exchange, dominant_row

log = logging.getLogger(__name__)

Kind = Literal["native", "megatron", "vllm"]
KINDS: Mapping[Kind, str] = {
    "native": "moemesh",
    "megatron": "Megatron-core JSONL",
    "vllm": "vLLM routed_experts array",
}


def kind_of(path: Path) -> Kind:
    """Whose file it is, by how it begins: one that is neither ours nor JSON can only be an array. Raises OSError."""
    if is_native(path):
        return "native"
    with path.open("rb") as file:
        return "megatron" if file.read(64).lstrip().startswith(b"{") else "vllm"


def open_trace(path: Path) -> Iterator[Exchange]:
    """The exchanges of our own file, of Megatron-core's JSONL or of vLLM's array, one by one. Raises BadTrace."""
    readers = {"native": read_native, "megatron": read_megatron, "vllm": read_vllm}
    return readers[kind_of(path)](path)


def load_trace(path: Path) -> list[Exchange]:
    """All exchanges. Logs a warning when one identical row dominates a layer. Raises BadTrace."""
    exchanges = list(open_trace(path))
    if warning := dominant_row(exchanges):
        log.warning("%s: %s", path, warning)
    return exchanges
