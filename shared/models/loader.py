"""Tensors of a checkpoint, as views of memory-mapped safetensors files.

A view costs no memory until it is read, and all processes of a host that read it share the pages. Weights are
only ever read through this file.
"""

import ctypes
import mmap
import os
from collections.abc import Mapping
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from shared.errors import ModelError
from shared.kernels.weights import Fp8Blocks, Weight
from shared.messages import ModelFacts
from shared.models.index import TensorInfo, data_start
from shared.models.layout import Shape, tensor_name
from shared.models.packed import SCALE_SUFFIX, unpack_mxfp4
from shared.models.source import ModelSource, open_source
from shared.models.spec import ModelSpec, Stored

_LIBC = ctypes.CDLL(None)


@dataclass(frozen=True)
class LayerWeights:
    """Tensors of one layer by their roles."""

    vectors: dict[str, Tensor]
    """Norms, biases, sinks."""
    matrices: dict[str, Weight]


class _Open(NamedTuple):
    """A file of tensors that is in use."""

    tensors: Any
    """Gives views of the mapped file, by name."""
    raw: FileIO
    start: int
    """Address of the file's first byte."""
    end: int

    def holds(self, tensor: Tensor) -> bool:
        return self.start <= tensor.data_ptr() and tensor.data_ptr() + tensor.nbytes <= self.end


def open_checkpoint(model: str) -> "Checkpoint":
    """A Hugging Face directory, a hub id, or "" for the embedded demo. Raises ModelError, UnsupportedModel."""
    return Checkpoint(open_source(model))


class Checkpoint:
    """Opens files when a tensor of theirs is first asked for; not thread-safe."""

    def __init__(self, source: ModelSource) -> None:
        self.source = source
        self._files: dict[str, _Open] = {}

    @property
    def path(self) -> Path:
        return self.source.path

    @property
    def spec(self) -> ModelSpec:
        return self.source.spec

    @property
    def digest(self) -> str:
        return self.source.digest

    @property
    def name(self) -> str:
        return self.source.name

    def facts(self) -> ModelFacts:
        return self.source.facts()

    def tensor(self, name: str) -> Tensor:
        """A view of the mapped file (mapped copy-on-write: writing to it stays private). Raises ModelError."""
        info = self.source.tensors.get(name)
        if info is None:
            raise ModelError(str(self.path), f"tensor {name} is missing")
        tensor = self._open(info, name).tensors.get_tensor(name)
        return tensor if tensor.data_ptr() % tensor.itemsize == 0 else tensor.clone()

    def load(self, role: str, layer: int, expert: int, device: torch.device, dtype: torch.dtype) -> Tensor:
        """The tensor of a role where kernels want it, in the shape of layout.py.

        On CPU matrices stay views in the dtype of the file and vectors (norms, biases) become fp32; on other devices
        everything is copied there as ``dtype``. What is stored packed, transposed or interleaved is copied in any case;
        FP8 becomes fp32.
        """
        stored = self.spec.names[role]
        tensor = self._stored(stored, tensor_name(self.spec, role, layer, expert), expert).contiguous()
        if device.type == "cpu":
            return tensor.float() if tensor.dim() == 1 else tensor
        return tensor.to(device=device, dtype=dtype)

    def weight(self, role: str, layer: int, expert: int, device: torch.device, dtype: torch.dtype) -> Weight:
        """What ``load`` gives, for kernels that multiply by it: FP8 stays as it is, on CPU as views."""
        stored, name = self.spec.names[role], tensor_name(self.spec, role, layer, expert)
        as_it_is = stored == Stored(stored.name) and self.tensor(name).dtype is torch.float8_e4m3fn
        return self._fp8(name).to(device) if as_it_is else self.load(role, layer, expert, device, dtype)

    def layer(self, roles: Mapping[str, Shape], layer: int, device: torch.device, dtype: torch.dtype) -> LayerWeights:
        """The tensors of these roles of a layer; see ``load`` and ``weight``."""
        at = (layer, 0, device, dtype)
        vectors = {role: self.load(role, *at) for role, shape in roles.items() if len(shape) == 1}
        return LayerWeights(vectors, {role: self.weight(role, *at) for role in roles if role not in vectors})

    def _stored(self, stored: Stored, name: str, expert: int) -> Tensor:
        """A view where the file's layout allows one."""
        if stored.packing == "mxfp4":
            blocks, scales = (self.tensor(f"{name}_{part}") for part in ("blocks", "scales"))
            tensor = unpack_mxfp4(blocks[expert], scales[expert])
        else:
            tensor = self._matrix(name)
            tensor = tensor[expert] if stored.stacked else tensor
        return _rows(tensor.t() if stored.transposed else tensor, stored.part)

    def _matrix(self, name: str) -> Tensor:
        """A tensor of the file; fp32 when it is stored as FP8 blocks."""
        tensor = self.tensor(name)
        if tensor.dtype is not torch.float8_e4m3fn:
            return tensor
        return self._fp8(name).unpacked()

    def _fp8(self, name: str) -> Fp8Blocks:
        """A view of a tensor of FP8 blocks."""
        assert self.spec.fp8_block  # index.check_tensors admits FP8 for nothing else
        return Fp8Blocks(self.tensor(name), self.tensor(name + SCALE_SUFFIX).float(), self.spec.fp8_block)

    def check_files(self) -> None:
        """Raises ModelError when an open file is not what it was: its weights are others, or reading could end us."""
        for file in self._files:
            self.source.check_file(file)

    def is_view(self, tensor: Tensor) -> bool:
        """Whether a tensor's bytes are those of an open file, unchanged."""
        return any(file.holds(tensor) for file in self._files.values())

    def let_go(self) -> None:
        """No page of the open files is needed here for now: they stay in the page cache, but do not count as ours.

        What is read through a view after all is mapped again. (Even making a view maps pages around its first one.)
        """
        for file in self._files.values():
            first = file.start // mmap.PAGESIZE * mmap.PAGESIZE
            _LIBC.madvise(ctypes.c_void_p(first), ctypes.c_size_t(file.end - first), ctypes.c_int(mmap.MADV_DONTNEED))

    def read(self, tensor: Tensor, address: int) -> bool:
        """Put the bytes of a contiguous view at an address. False: it is no view, and nothing has happened.

        They come from the file itself, so that no pages are mapped here, nor let go of again, which interrupts other
        cores. Raises ModelError, OSError.
        """
        for name, file in self._files.items():
            if file.holds(tensor):
                room = (ctypes.c_char * tensor.nbytes).from_address(address)
                if os.preadv(file.raw.fileno(), [room], tensor.data_ptr() - file.start) != tensor.nbytes:
                    raise ModelError(str(self.path / name), "ends before its last tensor")
                return True
        return False

    def _open(self, info: TensorInfo, name: str) -> _Open:
        """The file of this tensor."""
        file = self._files.get(info.file)
        if file is None:
            file = self._files[info.file] = self._opened(info, name)
        return file

    def _opened(self, info: TensorInfo, name: str) -> _Open:
        path = self.path / info.file
        try:
            self.source.check_file(info.file)
            tensors, raw = safe_open(str(path), framework="pt", device="cpu"), FileIO(path)
            self.source.check_file(info.file)  # not replaced between the two
            first, again = tensors.get_tensor(name), tensors.get_tensor(name)
            if first.data_ptr() != again.data_ptr():
                raise ModelError(str(path), "safetensors gives copies of tensors; a version that maps is needed")
            start = first.data_ptr() - info.start - data_start(raw)
            return _Open(tensors, raw, start, start + os.fstat(raw.fileno()).st_size)
        except (OSError, SafetensorError) as error:
            raise ModelError(str(path), f"cannot be mapped: {error}") from error


def _rows(tensor: Tensor, part: str) -> Tensor:
    """The rows of gate or of up, where they share a tensor."""
    half = len(tensor) // 2
    parts = {"": slice(None), "first": slice(half), "second": slice(half, None)}
    return tensor[parts[part] if part in parts else slice(part == "odd", None, 2)]
