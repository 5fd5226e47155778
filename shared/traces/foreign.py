"""Routing traces of other programs: Megatron-core's JSONL, vLLM's arrays, counts as EPLB takes them.

Formats as of Megatron-core's `router_trace.py` (``--moe-routing-trace-path``, one file per rank) and of vLLM's
``routed_experts`` (``--enable-return-routed-experts``: [tokens, layers, k], over HTTP a base64 text of an .npy file).
"""

import base64
import binascii
import io
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from shared.traces.records import BadTrace, Exchange, check_ids


def read_megatron(path: Path) -> Iterator[Exchange]:
    """The exchanges of a JSONL file. Layers of multi-token prediction (block "mtp") are left out: they share numbers.

    Raises BadTrace with the line number.
    """
    with path.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            record = _json_line(path, f"line {number}", line)
            if record.get("block", "decoder") == "decoder":
                yield _megatron_exchange(path, f"line {number}", record)


def _json_line(path: Path, where: str, line: bytes) -> dict[str, Any]:
    try:
        record = json.loads(line)
    except ValueError as error:
        cut = "the file is cut off" if not line.endswith(b"\n") else f"not JSON ({error})"
        raise BadTrace(path, where, cut) from error
    if not isinstance(record, dict):
        raise BadTrace(path, where, "not a JSON object")
    return record


def _megatron_exchange(path: Path, where: str, record: dict[str, Any]) -> Exchange:
    try:
        layer, step, rows, k = (record[name] for name in ("layer", "step", "num_tokens", "topk"))
        ids = np.array(record["top_indices"])
        if not all(isinstance(n, int) and n >= 0 for n in (layer, step, rows, k)):
            raise BadTrace(path, where, "layer, step, num_tokens and topk must be whole numbers")
    except KeyError as error:
        raise BadTrace(path, where, f"no {error}: not a record of Megatron-core") from error
    except ValueError as error:
        raise BadTrace(path, where, f"top_indices are not a matrix ({error})") from error
    ids = ids.reshape(rows, k) if ids.size == 0 == rows * k else ids
    if ids.shape != (rows, k) or not (ids.size == 0 or np.issubdtype(ids.dtype, np.integer)):
        raise BadTrace(path, where, f"top_indices are not whole numbers [{rows}, {k}]")
    return Exchange(layer, step, _checked(path, where, ids))


def read_vllm(path: Path, layers: Sequence[int] | None = None) -> Iterator[Exchange]:
    """The exchanges of a ``routed_experts`` array [tokens, layers, k]: .npy, or the base64 text of an HTTP response.

    A request decodes one token at a time, and prefills several at once, which the array does not tell apart: every
    token is a step of its own. ``layers``: checkpoint indices of the array's layers; default 0, 1, 2...

    Raises BadTrace with the token's number.
    """
    table = _array(path)
    if table.ndim != 3:
        raise BadTrace(path, "array", f"{table.ndim} dimensions, expected [tokens, layers, k]")
    names = range(table.shape[1]) if layers is None else layers
    if len(names) != table.shape[1]:
        raise BadTrace(path, "array", f"{table.shape[1]} layers, expected {len(names)}")
    for token, choices in enumerate(table):
        for layer, ids in zip(names, choices, strict=True):
            yield Exchange(layer, token, _checked(path, f"record {token + 1}, layer {layer}", ids[None]))


def read_counts(path: Path) -> NDArray[np.float64]:
    """Tokens per expert, [layers, experts], as EPLB takes them: .npy, or JSON (also one row per line).

    Raises BadTrace with the number of the line or the layer.
    """
    counts = _array(path) if path.suffix == ".npy" else _json_counts(path)
    if counts.ndim != 2 or not counts.size:
        raise BadTrace(path, "array", f"shape {list(counts.shape)}, expected [layers, experts]")
    for number, row in enumerate(counts, 1):
        if not np.isfinite(row).all() or (row < 0).any():
            raise BadTrace(path, f"record {number}", "counts must be numbers, and not negative")
    return counts.astype(np.float64)


def _json_counts(path: Path) -> NDArray[np.number]:
    try:
        text = path.read_text("utf-8")
    except UnicodeDecodeError as error:
        raise BadTrace(path, "text", f"not UTF-8 ({error})") from error
    try:
        rows = json.loads(text)
    except ValueError:
        rows = [_json_row(path, number, line) for number, line in enumerate(text.splitlines(), 1)]
    width = len(rows[0]) if isinstance(rows, list) and rows and isinstance(rows[0], list) else 0
    for number, row in enumerate(rows if isinstance(rows, list) else [rows], 1):
        if not isinstance(row, list) or len(row) != width or not all(isinstance(n, int | float) for n in row):
            raise BadTrace(path, f"line {number}", f"not a row of {width or 'some'} counts")
    return np.array(rows, np.float64)


def _json_row(path: Path, number: int, line: str) -> Any:
    try:
        return json.loads(line)
    except ValueError as error:
        raise BadTrace(path, f"line {number}", f"not JSON ({error})") from error


def _array(path: Path) -> NDArray[np.number]:
    """An .npy file, or a base64 text of one. Never unpickles."""
    data = path.read_bytes()
    try:
        if not data.startswith(b"\x93NUMPY"):
            data = base64.b64decode(data.strip().strip(b'"'), validate=True)
        table = np.load(io.BytesIO(data), allow_pickle=False)
    except (ValueError, EOFError, OSError, MemoryError, binascii.Error) as error:
        raise BadTrace(path, "array", f"neither an .npy file nor base64 of one, or cut off ({error})") from error
    if not isinstance(table, np.ndarray) or not np.issubdtype(table.dtype, np.number):
        raise BadTrace(path, "array", "not an array of numbers")
    return table


def _checked(path: Path, where: str, ids: NDArray[np.number]) -> NDArray[np.int32]:
    whole = ids.astype(np.int32)
    problem = check_ids(whole) if (whole == ids).all() else "expert ids must be whole numbers"
    if problem:
        raise BadTrace(path, where, problem)
    return whole
