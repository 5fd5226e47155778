"""The seam between models and devices: every arithmetic step of the decoder and the experts.

Three implementations: ``cpu`` (numba, bf16 weights, fp32 arithmetic), ``reference`` (plain torch, any device; the
yardstick in tests) and ``cuda`` (the reference, but for experts, attention and graphs). On CPU every output row has a
fixed order of operations, whatever the number of rows: that is what the exactness contract rests on. Activations are
fp32 on CPU and the model's dtype on CUDA.

T = rows (tokens) of this call, H = hidden size, P = parts (token, chosen expert) of this call.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from shared.activation import Choice
from shared.kernels.weights import Weight
from shared.models.spec import RouterSpec


class ExpertTable(Protocol):
    """Weights of one layer's resident experts in the form that a kernel wants; made by ``Kernels.expert_table``."""

    @property
    def resident(self) -> frozenset[int]:
        """Logical expert ids."""
        ...

    @property
    def nbytes(self) -> int:
        """Bytes of what the table keeps: all weights of its experts as kernels read them. On CPU they may be mapped."""
        ...

    def without(self, experts: frozenset[int]) -> "ExpertTable":
        """A table of the others. Nobody may compute with these any more, not with the old table either."""
        ...


T = TypeVar("T")


@dataclass(frozen=True)
class Visibility:
    """Which cache positions a row at position p sees, out of 0..p, and what else takes a share of its softmax."""

    scale: float
    """Factor of the scores."""
    window: int = 0
    """The last ``window`` only; 0 = all."""
    chunk: int = 0
    """Those in p's own chunk of this size only; 0 = all."""
    sinks: Tensor | None = None
    """fp32 [heads]: a score that takes its share and gives nothing."""


@dataclass(frozen=True)
class Paged:
    """Where the rows of a step lie in the paged cache; tensors on the device."""

    tables: Tensor
    """int32 [sequences, max blocks]"""
    sequence: Tensor
    """int32 [T]: row of ``tables``."""
    positions: Tensor
    """int32 [T]"""


class Kernels(Protocol):
    """All tensors lie on one device. ``out`` arguments are written and returned; without one a tensor is made.

    "Rows" may be a view whose rows are further apart than they are long; each row is contiguous.
    """

    def take(self, table: Tensor, ids: Tensor, out: Tensor) -> Tensor:
        """out[t] = row ids[t] of table [N, D]; ids int64 [T], out [T, D]; the table has any dtype of weights."""
        ...

    def add(self, x: Tensor, y: Tensor, scale: float = 1.0) -> None:
        """x += scale * y, element by element; both of one shape."""
        ...

    def gated_add(self, x: Tensor, y: Tensor, gate: Tensor) -> None:
        """x [T, H] += sigmoid(gate [T, 1]) * y [T, H]."""
        ...

    def scale(self, x: Tensor, factor: float) -> None:
        """x *= factor."""
        ...

    def scale_rows(self, x: Tensor, factors: Tensor, index: Tensor) -> None:
        """x [T, ...] row t *= factors[index[t]]; factors fp32 [N], index int32 [T]."""
        ...

    def clip(self, x: Tensor, limit: float) -> None:
        """Bound x to -limit .. limit."""
        ...

    def copy(self, x: Tensor, out: Tensor) -> Tensor:
        """out = x; rows [T, heads, D] of both may be views."""
        ...

    def linear(self, x: Tensor, weight: Weight, bias: Tensor | None = None, out: Tensor | None = None) -> Tensor:
        """x [T, K] @ weight [N, K].T (+ bias [N]) -> [T, N]; weight is fp32, bf16, fp16 or FP8."""
        ...

    def head_linear(self, x: Tensor, weight: Tensor, out: Tensor) -> Tensor:
        """out[t, h] = weight[h] @ x[t, h]: x [T, heads, K], weight [heads, N, K] (rows), out [T, heads, N] (rows)."""
        ...

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float, out: Tensor | None = None) -> Tensor:
        """Root-mean-square norm over the last dimension of rows x [..., D] with weight [D]."""
        ...

    def layer_norm(self, x: Tensor, weight: Tensor, bias: Tensor, eps: float, out: Tensor | None = None) -> Tensor:
        """Layer norm over the last dimension of x [..., D] with weight and bias [D]."""
        ...

    def rope(self, x: Tensor, cos: Tensor, sin: Tensor, positions: Tensor, interleaved: bool = False) -> None:
        """Rotate the first 2*R dimensions of rows x [T, heads, D] in place.

        Pairs are (i, i + R), the half-split form (HF ``rotate_half``), or (2i, 2i + 1) when ``interleaved``.
        cos, sin: [max positions, R] fp32; positions: int32 [T].
        """
        ...

    def store_kv(self, cache: Tensor, rows: Tensor, slots: Tensor) -> None:
        """cache [blocks, block_size, kv_heads, D] viewed as slots; rows [T, kv_heads, D]; slots int64 [T]."""
        ...

    def attention(self, q: Tensor, caches: tuple[Tensor, Tensor], at: Paged, sees: Visibility, out: Tensor) -> Tensor:
        """Causal attention of T query rows over the paged cache -> out [T, heads * V].

        q [T, heads, D]; keys [blocks, block_size, kv_heads, D], values [blocks, block_size, kv_heads, V] (rows: V <= D
        leading dimensions of the keys, say). Row t sees cache positions 0..positions[t], less what ``sees`` excludes.
        """
        ...

    def route(
        self,
        x: Tensor,
        weight: Tensor,
        router: RouterSpec,
        bias: Tensor | None = None,
        correction: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Gate: x [T, H], weight [E, H] -> (weights fp32 [T, k], ids int32 [T, k]); ties go to the lowest id.

        bias and correction: [E], as ``router`` says. sparsemixer (GRIN, arXiv 2409.12136): the best score s takes the
        softmax's share among the scores e for which (s - e) / max(|e|, s) <= 2 * jitter; then the same without it.
        """
        ...

    def expert_table(self, experts: Mapping[int, Sequence[Weight]], beside: ExpertTable | None = None) -> ExpertTable:
        """Logical id -> (gate [I, H], up [I, H], down [H, I]), then the biases of all three or none.

        They stay as they are: on CPU mapped, on CUDA copied side by side, FP8 at one byte per weight. ``beside``: a
        table whose experts this one has too. Who computes with that one may go on; it serves so once only.
        """
        ...

    def experts(
        self, x: Tensor, table: ExpertTable, tokens: Tensor, ids: Tensor, activation: str, out: Tensor
    ) -> Tensor:
        """Grouped feed-forward: part p is expert ids[p] (int32 [P]) applied to row tokens[p] (int32 [P]) of x [T, H].

        ``ids`` is sorted ascending, so that each expert's weights are read once. out fp32 [P, H], not weighted.
        """
        ...

    def answering(
        self, route: Callable[[], tuple[Tensor, Tensor]], room: Tensor, table: ExpertTable, activation: str
    ) -> "Answering | None":
        """All of an expert instance's work in an exchange as one call, or None where that brings nothing.

        ``route`` gates ``room`` [T, H] with these kernels; both and ``table`` stay as they are while it is used.
        """
        ...

    def combine(self, out: Tensor, rows: Sequence[Tensor], source: Tensor, index: Tensor, weights: Tensor) -> None:
        """out [T, H] += sum over j of weights[t, j] * rows[source[t, j]][index[t, j]], j ascending, in fp32.

        source, index int32 [T, k] and weights fp32 [T, k] are in ascending order of expert id along j.
        """
        ...

    def gather(
        self, out: Tensor, replies: NDArray[np.int64], homes: NDArray[np.uint64], chosen: NDArray[np.uint32]
    ) -> int | None:
        """Check and arrange the parts of all replies to an exchange, then ``combine`` them, as one call.

        Args:
            replies: [n, 4], of each the bit of its sender, the addresses of its PARTS and of its rows, their number.
            homes: [experts].
            chosen: [T, k], gets the experts of every row in ascending order; of use only when the result is 0.

        Returns:
            A number of shared.activation.PROBLEMS, 0 when ``out`` has the sum; None where it brings nothing: nothing
            has happened then.
        """
        ...

    def record(self, call: Callable[[], T]) -> Callable[[], T]:
        """Something that does again what ``call`` does to tensors on the device, and returns what it returned.

        It uses the memory of the first time, which must live on: new values are to be written into the same tensors.
        ``call`` must use nothing but these kernels on them. On CUDA it runs as it is the first time and is
        captured the second time, which may return other tensors.
        """
        ...


class Answering(Protocol):
    """See ``services.experts.compute.answer``, which takes the same arguments after the layer."""

    recorded: tuple[int, ...]
    """The same in the form that ``shared.express.serve`` takes, good for as long as this object lives."""

    def __call__(
        self,
        rows: Tensor,
        choice: Choice,
        meta: NDArray[np.uint8],
        out: Tensor,
        counts: NDArray[np.int64],
    ) -> tuple[int, int]: ...


def select_kernels(device: torch.device, threads: int, precise: bool = True) -> Kernels:
    """The implementation for a device: numba on CPU, torch on CUDA. ``precise``: see ``CpuKernels``."""
    if device.type == "cpu":
        from shared.kernels.cpu import CpuKernels

        return CpuKernels(threads, precise=precise)
    from shared.kernels.cuda import CudaKernels

    return CudaKernels(device)
