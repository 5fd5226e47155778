"""The seam between models and devices: every arithmetic step of the decoder and the experts.

Two implementations: ``cpu`` (numba, bf16 weights, fp32 arithmetic) and ``reference`` (plain torch, any device; the
yardstick in tests and what runs on CUDA). On CPU every output row has a fixed order of operations, whatever the number
of rows: that is what the exactness contract rests on. Activations are fp32 on CPU and the model's dtype on CUDA.

T = rows (tokens) of this call, H = hidden size, P = parts (token, chosen expert) of this call.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Protocol, TypeVar

import torch
from torch import Tensor

from shared.models.spec import RouterSpec

T = TypeVar("T")


class ExpertTable(Protocol):
    """Weights of one layer's resident experts in the form that a kernel wants; made by ``Kernels.expert_table``."""

    @property
    def resident(self) -> frozenset[int]:
        """Logical expert ids."""
        ...


class Kernels(Protocol):
    """All tensors lie on one device. ``out`` arguments are written and returned; without one a tensor is made."""

    def take(self, table: Tensor, ids: Tensor, out: Tensor) -> Tensor:
        """out[t] = row ids[t] of table [N, D]; ids int64 [T], out [T, D]; the table has any dtype of weights."""
        ...

    def add(self, x: Tensor, y: Tensor) -> None:
        """x += y, element by element; both of one shape."""
        ...

    def linear(self, x: Tensor, weight: Tensor, bias: Tensor | None = None, out: Tensor | None = None) -> Tensor:
        """x [T, K] @ weight [N, K].T (+ bias [N]) -> [T, N]; weight is fp32, bf16 or fp16."""
        ...

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float, out: Tensor | None = None) -> Tensor:
        """Root-mean-square norm over the last dimension of x [..., D] with weight [D]."""
        ...

    def rope(self, x: Tensor, cos: Tensor, sin: Tensor, positions: Tensor) -> None:
        """Rotate x [T, heads, D] in place, half-split form (HF ``rotate_half``) on the first 2*R dimensions.

        cos, sin: [max positions, R] fp32; positions: int32 [T].
        """
        ...

    def store_kv(self, cache: Tensor, rows: Tensor, slots: Tensor) -> None:
        """cache [blocks, block_size, kv_heads, D] viewed as slots; rows [T, kv_heads, D]; slots int64 [T]."""
        ...

    def attention(
        self,
        q: Tensor,
        k_cache: Tensor,
        v_cache: Tensor,
        tables: Tensor,
        sequence: Tensor,
        positions: Tensor,
        scale: float,
        window: int = 0,
        out: Tensor | None = None,
    ) -> Tensor:
        """Causal attention of T query rows over the paged cache -> [T, heads * D].

        q [T, heads, D]; caches [blocks, block_size, kv_heads, D]; tables int32 [sequences, max blocks]; sequence int32
        [T] = row of ``tables``; positions int32 [T]: row t sees cache positions 0..positions[t] (the last ``window`` if
        > 0).
        """
        ...

    def route(self, x: Tensor, weight: Tensor, router: RouterSpec) -> tuple[Tensor, Tensor]:
        """Gate: x [T, H], weight [E, H] -> (weights fp32 [T, k], ids int32 [T, k]); ties go to the lowest id."""
        ...

    def expert_table(self, experts: Mapping[int, Sequence[Tensor]]) -> ExpertTable:
        """Logical id -> (gate [I, H], up [I, H], down [H, I]). On CPU the tensors stay where they are (mapped)."""
        ...

    def experts(
        self, x: Tensor, table: ExpertTable, tokens: Tensor, ids: Tensor, activation: str, out: Tensor
    ) -> Tensor:
        """Grouped feed-forward: part p is expert ids[p] (int32 [P]) applied to row tokens[p] (int32 [P]) of x [T, H].

        ``ids`` is sorted ascending, so that each expert's weights are read once. out fp32 [P, H], not weighted.
        """
        ...

    def combine(self, out: Tensor, rows: Sequence[Tensor], source: Tensor, index: Tensor, weights: Tensor) -> None:
        """out [T, H] += sum over j of weights[t, j] * rows[source[t, j]][index[t, j]], j ascending, in fp32.

        source, index int32 [T, k] and weights fp32 [T, k] are in ascending order of expert id along j.
        """
        ...

    def record(self, call: Callable[[], T]) -> Callable[[], T]:
        """Something that does again what ``call`` does with tensors of this device, and returns what it returned.

        It works on the same memory: new values are to be written into the same tensors. ``call`` must use nothing but
        these kernels on them.
        """
        ...


def select_kernels(device: torch.device, threads: int) -> Kernels:
    """The implementation for a device: numba on CPU, torch elsewhere."""
    if device.type == "cpu":
        from shared.kernels.cpu import CpuKernels

        return CpuKernels(threads)
    from shared.kernels.reference import ReferenceKernels

    return ReferenceKernels()
