"""Rows of many passages on disk, as training reads them: in any order, again and again, whatever memory there is."""

import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

import numpy as np
from numpy.typing import NDArray

from shared.models.spec import ModelSpec
from shared.predictors.recording import Passage, Reader
from shared.predictors.training import Examples

_MOST = float(np.finfo(np.float16).max)


class Recorded:
    """Passages of one length, in files of a temporary directory that goes when this is closed; a context manager."""

    def __init__(self, spec: ModelSpec, passages: int, context: int) -> None:
        """Room for so many passages of ``context`` tokens: 2 bytes for each number of a row, at every layer."""
        self._context, self._count = context, 0
        self._directory = tempfile.TemporaryDirectory(prefix="moemesh-rows-")
        total, k = passages * context, spec.router.top_k
        self._rows = {la: self._file(f"rows-{la}", np.float16, (total, spec.hidden)) for la in spec.moe_layers}
        self._ids = {la: self._file(f"ids-{la}", np.uint16, (total, k)) for la in spec.moe_layers}

    def read(self, reader: Reader, passages: Sequence[NDArray[np.int32]], told: Callable[[int], None]) -> None:
        """Append what gates read and choose in these tokens; ``told`` hears how many rows there are so far."""
        for tokens in passages:
            passage, at = reader.read(tokens), slice(len(self), len(self) + self._context)
            for layer, rows in passage.rows.items():
                self._rows[layer][at] = rows.clip(-_MOST, _MOST)
                self._ids[layer][at] = passage.ids[layer]
            self._count += 1
            told(len(self))

    def examples(self, layer: int, later: int, passages: int) -> Examples:
        """Of the first so many passages: rows at ``layer``, and what they chose at the layer ``later``."""
        last = passages * self._context
        return Examples(self._rows[layer][:last], self._ids[later][:last])

    def passages(self, first: int) -> Iterator[Passage]:
        """From number ``first`` on."""
        for number in range(first, self._count):
            at = slice(number * self._context, (number + 1) * self._context)
            rows = {layer: array[at].astype(np.float32) for layer, array in self._rows.items()}
            yield Passage(rows, {layer: array[at].astype(np.int32) for layer, array in self._ids.items()})

    def __len__(self) -> int:
        return self._count * self._context

    def close(self) -> None:
        self._directory.cleanup()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def _file(self, name: str, dtype: type, shape: tuple[int, int]) -> NDArray:
        path = Path(self._directory.name) / f"{name}.npy"
        return np.lib.format.open_memmap(path, mode="w+", dtype=dtype, shape=shape)
