"""The tensor index of a checkpoint, read from safetensors headers alone. No torch, no weights.

Format: 8 bytes little-endian length, that much JSON {name: {dtype, shape, data_offsets}}, then the data
(https://huggingface.co/docs/safetensors).
"""

import json
import math
import os
from collections.abc import Iterable, Mapping
from io import FileIO
from pathlib import Path
from typing import Any, NamedTuple

from pydantic import BaseModel, TypeAdapter

from shared.errors import ModelError
from shared.models.layout import Expected
from shared.models.packed import FP8, SCALE_SUFFIX

ITEM_BYTES = {"F32": 4, "BF16": 2, "F16": 2, "F8_E4M3": 1, "U8": 1}
"""Dtypes that can be read, by their safetensors names."""
_SINGLE = "model.safetensors"
_SHARDED = "model.safetensors.index.json"


class TensorInfo(NamedTuple):
    """Where a tensor lies."""

    file: str
    """File name inside the checkpoint directory."""
    dtype: str
    """As safetensors writes it, e.g. BF16."""
    shape: tuple[int, ...]
    start: int
    """First byte, counted from the end of the header."""
    end: int


class _Entry(BaseModel):
    dtype: str
    shape: tuple[int, ...]
    data_offsets: tuple[int, int]


_ENTRIES = TypeAdapter(dict[str, _Entry])


def read_json(path: Path) -> dict[str, Any]:
    """An object from a JSON file. Raises ModelError that names the file."""
    try:
        value = json.loads(path.read_text("utf-8"))
    except FileNotFoundError as error:
        raise ModelError(str(path), "is missing") from error
    except OSError as error:
        raise ModelError(str(path), f"cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise ModelError(str(path), f"is not valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise ModelError(str(path), "holds no JSON object")
    return value


def read_index(directory: Path) -> dict[str, TensorInfo]:
    """All tensors of a checkpoint directory, single file or sharded. Raises ModelError."""
    if (directory / _SINGLE).exists():
        return _read_header(directory / _SINGLE)
    if (directory / _SHARDED).exists():
        return _read_shards(directory)
    problem = f"holds no safetensors weights ({_SINGLE} or {_SHARDED})"
    if any(directory.glob("*.bin")) or any(directory.glob("*.pt")):
        problem += "; PyTorch .bin and .pt files are not supported, convert them to safetensors"
    raise ModelError(str(directory), problem)


def check_tensors(
    index: Mapping[str, TensorInfo], expected: Iterable[Expected], where: str, fp8_block: tuple[int, int] | None = None
) -> None:
    """Raises ModelError unless every expected tensor is there with its shape and a dtype that can be served.

    With ``fp8_block`` matrices may be FP8, if the scales of their blocks are there as well.
    """
    wanted = {tensor.name: tensor for tensor in expected}
    missing = [name for name in wanted if name not in index]
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise ModelError(where, f"tensor {missing[0]}{more} is missing")
    for tensor in wanted.values():
        dtype = index[tensor.name].dtype
        if dtype == FP8 and fp8_block and len(tensor.shape) == 2:
            scales = tuple(-(-size // block) for size, block in zip(tensor.shape, fp8_block, strict=True))
            check_tensors(index, [Expected(tensor.name + SCALE_SUFFIX, scales, ("F32", "BF16"))], where)
            tensor = tensor._replace(dtypes=(FP8,))
        _check_tensor(index[tensor.name], tensor, where)


def _check_tensor(info: TensorInfo, tensor: Expected, where: str) -> None:
    if info.shape != tensor.shape:
        problem = f"has shape {list(info.shape)}, config.json asks for {list(tensor.shape)}"
        raise ModelError(where, f"tensor {tensor.name} {problem}")
    if info.dtype not in tensor.dtypes:
        supported = ", ".join(tensor.dtypes)
        raise ModelError(where, f"tensor {tensor.name} has dtype {info.dtype}; supported: {supported}")


def _read_shards(directory: Path) -> dict[str, TensorInfo]:
    path = directory / _SHARDED
    files = read_json(path).get("weight_map")
    if not isinstance(files, dict) or not all(isinstance(f, str) and f == Path(f).name for f in files.values()):
        raise ModelError(str(path), "weight_map has to be an object of tensor names and file names")
    headers = {file: _read_header(directory / file) for file in sorted(set(files.values()))}
    for name, file in files.items():
        if name not in headers[file]:
            raise ModelError(str(directory / file), f"tensor {name} is missing, though {_SHARDED} lists it here")
    return {name: headers[file][name] for name, file in files.items()}


def _read_header(path: Path) -> dict[str, TensorInfo]:
    data_bytes, entries = _parse_header(path)
    index = {}
    for name, entry in entries.items():
        start, end = entry.data_offsets
        size = ITEM_BYTES.get(entry.dtype)
        if not 0 <= start <= end or (size and end - start != size * math.prod(entry.shape)):
            raise ModelError(str(path), f"tensor {name} has offsets that do not fit its shape")
        if end > data_bytes:
            raise ModelError(str(path), f"is truncated: tensor {name} ends after the end of the file")
        index[name] = TensorInfo(path.name, entry.dtype, entry.shape, start, end)
    return index


def data_start(file: FileIO) -> int:
    """The byte of a safetensors file from which offsets count. Raises OSError."""
    return 8 + int.from_bytes(os.pread(file.fileno(), 8, 0), "little")


def _parse_header(path: Path) -> tuple[int, dict[str, _Entry]]:
    """(bytes of data behind the header, entries)"""
    try:
        with path.open("rb") as file:
            size = path.stat().st_size
            length = int.from_bytes(file.read(8), "little")
            if size < 8 or length > size - 8:
                raise ModelError(str(path), f"is truncated or not a safetensors file ({size} bytes)")
            header = json.loads(file.read(length))
        entries = {name: entry for name, entry in header.items() if name != "__metadata__"}
        return size - 8 - length, _ENTRIES.validate_python(entries)
    except FileNotFoundError as error:
        raise ModelError(str(path), "is missing") from error
    except OSError as error:
        raise ModelError(str(path), f"cannot be read: {error.strerror}") from error
    except (ValueError, AttributeError, RecursionError) as error:
        raise ModelError(str(path), "is not a safetensors file: its header is damaged") from error
