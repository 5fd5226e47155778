"""Our own trace files: one record per step and layer, appended as they come, a byte or two per choice.

    magic "MOETRACE" | u32 length | header, MessagePack | records
    record: u32 crc of what follows | u16 layer | u16 k | u32 rows | u64 step | ids [rows, k], uint8 or uint16

All little-endian. Ids take one byte when the header's number of experts allows. A file that was cut off is refused with
the number of the record, after the whole ones before it have been given out.
"""

import os
import struct
import zlib
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import BinaryIO, Self, cast

import msgpack
import numpy as np
from numpy.typing import NDArray

from shared.traces.records import BadTrace, Exchange, check_ids

MAGIC = b"MOETRACE"
VERSION = 1
_LENGTH = struct.Struct("<I")
_RECORD = struct.Struct("<IHHIQ")
_MAX_HEADER = 1 << 20


MOST_EXPERTS = 1 << 16
"""Per layer: ids have at most two bytes."""


@dataclass(frozen=True)
class Header:
    """What all records of a file have in common."""

    model: str
    digest: str
    """Of the model, as in ModelFacts; empty: unknown."""
    experts: int
    """Per layer."""
    layers: tuple[int, ...]
    """Checkpoint indices of the layers that have experts."""
    version: int = VERSION

    def __post_init__(self) -> None:
        if not 1 <= self.experts <= MOST_EXPERTS:
            raise ValueError(f"{self.experts} experts: a trace takes 1 to {MOST_EXPERTS}")

    @property
    def dtype(self) -> np.dtype:
        return id_dtype(self.experts)


def id_dtype(experts: int) -> np.dtype:
    """How the ids of so many experts are stored."""
    return np.dtype("u1" if experts <= 256 else "<u2")


def encode_record(dtype: np.dtype, layer: int, step: int, ids: NDArray[np.integer]) -> bytes:
    """The record of one exchange with ids [rows, k]."""
    body = _RECORD.pack(0, layer, ids.shape[1], ids.shape[0], step)[_LENGTH.size :] + ids.astype(dtype).tobytes()
    return _LENGTH.pack(zlib.crc32(body)) + body


class TraceWriter:
    """Appends exchanges to a new file; a context manager. Whole records reach the file with every ``flush``."""

    def __init__(self, path: Path, header: Header) -> None:
        """Raises FileExistsError: a trace is never overwritten."""
        self._header = header
        self._file = path.open("xb")
        packed = cast(bytes, msgpack.packb(asdict(header)))
        self._file.write(MAGIC + _LENGTH.pack(len(packed)) + packed)

    def append(self, layer: int, step: int, ids: NDArray[np.integer]) -> None:
        """Write the top-k ids [rows, k] of one exchange. Raises ValueError for ids that no reader would take."""
        problem = check_ids(ids, self._header.experts)
        if layer not in self._header.layers:
            problem = f"layer {layer} is not in the header"
        if problem:
            raise ValueError(problem)
        self._file.write(encode_record(self._header.dtype, layer, step, ids))

    def flush(self) -> None:
        self._file.flush()

    def close(self) -> None:
        self._file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()


def is_native(path: Path) -> bool:
    """Whether the file begins as ours do."""
    with path.open("rb") as file:
        return file.read(len(MAGIC)) == MAGIC


def read_header(path: Path) -> Header:
    """Raises BadTrace."""
    with path.open("rb") as file:
        return _header(path, file)


def read_native(path: Path) -> Iterator[Exchange]:
    """The exchanges of a file, one after the other. Raises BadTrace at the first record that is not whole."""
    with path.open("rb") as file:
        header = _header(path, file)
        yield from read_records(path, header, file, os.fstat(file.fileno()).st_size)


def read_records(path: Path, header: Header, file: BinaryIO, end: int) -> Iterator[Exchange]:
    """The exchanges from here to the end of a file of so many bytes, or of what was sent instead of written.

    Raises BadTrace with the number of the record, counted from here.
    """
    number = 0
    while fields := file.read(_RECORD.size):
        number += 1
        yield _record(path, f"record {number}", header, fields, file, end)


def _header(path: Path, file: BinaryIO) -> Header:
    start = file.read(len(MAGIC) + _LENGTH.size)
    if not start.startswith(MAGIC) or len(start) < len(MAGIC) + _LENGTH.size:
        raise BadTrace(path, "header", "not a trace of moemesh")
    length = _LENGTH.unpack(start[len(MAGIC) :])[0]
    packed = file.read(min(length, _MAX_HEADER))
    try:
        fields = msgpack.unpackb(packed)
        if fields["version"] != VERSION:
            raise BadTrace(path, "header", f"version {fields['version']}, this program reads {VERSION}")
        return Header(
            str(fields["model"]), str(fields["digest"]), int(fields["experts"]), tuple(map(int, fields["layers"]))
        )
    except (ValueError, TypeError, KeyError, msgpack.UnpackException) as error:
        raise BadTrace(path, "header", f"truncated or damaged ({error})") from error


def _record(path: Path, where: str, header: Header, fields: bytes, file: BinaryIO, end: int) -> Exchange:
    if len(fields) < _RECORD.size:
        raise BadTrace(path, where, "the file is cut off")
    crc, layer, k, rows, step = _RECORD.unpack(fields)
    size = rows * k * header.dtype.itemsize
    if size > end - file.tell():
        raise BadTrace(path, where, "the file is cut off")
    data = file.read(size)
    if zlib.crc32(fields[_LENGTH.size :] + data) != crc:
        raise BadTrace(path, where, "damaged: its checksum is wrong")
    ids = np.frombuffer(data, header.dtype).reshape(rows, k).astype(np.int32)
    problem = check_ids(ids, header.experts) or (
        "" if layer in header.layers else f"layer {layer} is not in the header"
    )
    if problem:
        raise BadTrace(path, where, problem)
    return Exchange(layer, step, ids)
