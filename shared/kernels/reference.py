"""The kernels in plain torch: the yardstick in tests, and most of what runs on CUDA (``cuda``).

Written to be read. Nothing here keeps a row's bits independent of its batch; see ``cpu`` for that.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from shared.kernels.base import ExpertTable, Paged, T, Visibility
from shared.kernels.reference_router import choose
from shared.kernels.weights import Weight, expert_bytes, unpacked
from shared.models.spec import RouterSpec

SWIGLU_LIMIT, SWIGLU_ALPHA = 7.0, 1.702
"""Of gpt-oss's activation."""


@dataclass(frozen=True)
class ReferenceTable:
    """Expert weights as they were given: logical id -> gate, up, down, and their biases if there are any."""

    weights: dict[int, Sequence[Weight]]

    @property
    def resident(self) -> frozenset[int]:
        return frozenset(self.weights)

    @property
    def nbytes(self) -> int:
        return expert_bytes(self.weights)

    def without(self, experts: frozenset[int]) -> "ReferenceTable":
        return ReferenceTable({e: weights for e, weights in self.weights.items() if e not in experts})


def activate(gate: Tensor, up: Tensor, activation: str) -> Tensor:
    """activation(gate) * up for silu, gelu (erf form), gelu_pytorch_tanh; gpt-oss's clamped_swiglu. Else ValueError."""
    if activation == "silu":
        return functional.silu(gate) * up
    if activation == "gelu":
        return functional.gelu(gate) * up
    if activation == "gelu_pytorch_tanh":
        return functional.gelu(gate, approximate="tanh") * up
    if activation == "clamped_swiglu":
        gate, up = gate.clamp(max=SWIGLU_LIMIT), up.clamp(-SWIGLU_LIMIT, SWIGLU_LIMIT)
        return gate * torch.sigmoid(SWIGLU_ALPHA * gate) * (up + 1)
    raise ValueError(f"unknown activation {activation!r}")


def feed_forward(rows: Tensor, weights: Sequence[Weight], activation: str) -> Tensor:
    """One expert applied to rows [R, H]: gate, up, down, and their biases if there are any; in the rows' dtype."""
    gate, up, down, *biases = (unpacked(weight, rows.dtype).to(rows.dtype) for weight in weights)
    b_gate, b_up, b_down = biases or (None, None, None)
    hidden = activate(functional.linear(rows, gate, b_gate), functional.linear(rows, up, b_up), activation)
    return functional.linear(hidden, down, b_down)


class ReferenceKernels:
    """``Kernels`` for any device. Activations keep their dtype; norms, softmax and the gate are fp32."""

    def record(self, call: Callable[[], T]) -> Callable[[], T]:
        """Nothing is written down: ``call`` itself does it again."""
        return call

    def answering(
        self, route: Callable[[], tuple[Tensor, Tensor]], room: Tensor, table: ExpertTable, activation: str
    ) -> None:
        """The steps one by one are fast enough where the device does not wait for the interpreter."""

    def gather(
        self, out: Tensor, replies: NDArray[np.int64], homes: NDArray[np.uint64], chosen: NDArray[np.uint32]
    ) -> None:
        """Likewise."""

    def take(self, table: Tensor, ids: Tensor, out: Tensor) -> Tensor:
        return out.copy_(table.index_select(0, ids))

    def add(self, x: Tensor, y: Tensor, scale: float = 1.0) -> None:
        x += scale * y.to(x.dtype)

    def gated_add(self, x: Tensor, y: Tensor, gate: Tensor) -> None:
        x += (gate.float().sigmoid() * y.float()).to(x.dtype)

    def scale(self, x: Tensor, factor: float) -> None:
        x *= factor

    def scale_rows(self, x: Tensor, factors: Tensor, index: Tensor) -> None:
        x *= factors[index.long()].view(-1, *[1] * (x.dim() - 1)).to(x.dtype)

    def clip(self, x: Tensor, limit: float) -> None:
        x.clamp_(-limit, limit)

    def copy(self, x: Tensor, out: Tensor) -> Tensor:
        return out.copy_(x)

    def linear(self, x: Tensor, weight: Weight, bias: Tensor | None = None, out: Tensor | None = None) -> Tensor:
        y = functional.linear(x, unpacked(weight, x.dtype).to(x.dtype), None if bias is None else bias.to(x.dtype))
        return y if out is None else out.copy_(y)

    def head_linear(self, x: Tensor, weight: Tensor, out: Tensor) -> Tensor:
        return out.copy_(torch.einsum("thk,hnk->thn", x, weight.to(x.dtype)))

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float, out: Tensor | None = None) -> Tensor:
        wide = x.float()
        y = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
        y = (y.to(x.dtype) * weight.to(x.dtype)).to(x.dtype)
        return y if out is None else out.copy_(y)

    def layer_norm(self, x: Tensor, weight: Tensor, bias: Tensor, eps: float, out: Tensor | None = None) -> Tensor:
        y = functional.layer_norm(x.float(), weight.shape, weight.float(), bias.float(), eps).to(x.dtype)
        return y if out is None else out.copy_(y)

    def rope(self, x: Tensor, cos: Tensor, sin: Tensor, positions: Tensor, interleaved: bool = False) -> None:
        half = cos.shape[1]
        c, s = (table[positions.long()].unsqueeze(1) for table in (cos, sin))
        firsts, seconds = (
            (slice(0, 2 * half, 2), slice(1, 2 * half, 2)) if interleaved else (slice(half), slice(half, 2 * half))
        )
        first, second = x[..., firsts].float(), x[..., seconds].float()
        rotated = first * c - second * s, second * c + first * s
        x[..., firsts], x[..., seconds] = (part.to(x.dtype) for part in rotated)

    def store_kv(self, cache: Tensor, rows: Tensor, slots: Tensor) -> None:
        cache.view(-1, *cache.shape[2:])[slots] = rows.to(cache.dtype)

    def attention(self, q: Tensor, caches: tuple[Tensor, Tensor], at: Paged, sees: Visibility, out: Tensor) -> Tensor:
        keys, values = caches
        mixed = out.view(len(q), q.shape[1], values.shape[3])
        for s in at.sequence.unique().tolist():
            rows = (at.sequence == s).nonzero().squeeze(1)
            positions = at.positions[rows].long()
            last = int(positions.max()) + 1
            blocks = at.tables[s, : -(-last // keys.shape[1])].long()
            k, v = (cache[blocks].flatten(0, 1)[:last] for cache in (keys, values))
            mixed[rows] = _attend(q[rows], k, v, positions, sees).to(mixed.dtype)
        return out

    def route(
        self,
        x: Tensor,
        weight: Tensor,
        router: RouterSpec,
        bias: Tensor | None = None,
        correction: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        logits = functional.linear(x.float(), weight.float(), None if bias is None else bias.float())
        weights, ids = choose(logits, router, correction)
        return weights.contiguous(), ids.int().contiguous()

    def expert_table(self, experts: Mapping[int, Sequence[Weight]], beside: ExpertTable | None = None) -> ExpertTable:
        if not isinstance(beside, ReferenceTable | None):
            raise TypeError("the expert table was made by other kernels")
        return ReferenceTable({**(beside.weights if beside else {}), **experts})

    def experts(
        self, x: Tensor, table: ExpertTable, tokens: Tensor, ids: Tensor, activation: str, out: Tensor
    ) -> Tensor:
        if not isinstance(table, ReferenceTable):
            raise TypeError("the expert table was made by other kernels")
        for expert in ids.unique().tolist():
            parts = (ids == expert).nonzero().squeeze(1)
            out[parts] = feed_forward(x[tokens[parts].long()], table.weights[expert], activation).to(out.dtype)
        return out

    def combine(self, out: Tensor, rows: Sequence[Tensor], source: Tensor, index: Tensor, weights: Tensor) -> None:
        offsets = torch.tensor([0, *(len(part) for part in rows)], device=out.device).cumsum(0)
        parts = torch.cat([part.float() for part in rows])
        total = torch.zeros(out.shape, dtype=torch.float32, device=out.device)
        for j in range(source.shape[1]):
            chosen = parts[offsets[source[:, j].long()] + index[:, j].long()]
            total += weights[:, j, None] * chosen
        out += total.to(out.dtype)


def hidden_positions(cache: Tensor, at: Tensor, sees: Visibility) -> Tensor:
    """bool: which positions ``cache`` of a sequence its rows at ``at`` do not see; the two are broadcast."""
    hidden = cache > at
    if sees.window:
        hidden |= cache <= at - sees.window
    if sees.chunk:
        hidden |= cache // sees.chunk != at // sees.chunk
    return hidden


def _attend(q: Tensor, k: Tensor, v: Tensor, positions: Tensor, sees: Visibility) -> Tensor:
    """One sequence: q [R, heads, D] at ``positions`` over k [P, kv_heads, D], v [P, kv_heads, V] -> [R, heads, V]."""
    group = q.shape[1] // k.shape[1]
    k, v = (rows.float().repeat_interleave(group, dim=1) for rows in (k, v))
    scores = torch.einsum("rhd,phd->hrp", q.float(), k) * sees.scale
    cache = torch.arange(k.shape[0], device=q.device)
    scores = scores.masked_fill(hidden_positions(cache, positions[:, None], sees), float("-inf"))
    if sees.sinks is not None:
        sinks = sees.sinks.float()[:, None, None].expand(-1, len(q), 1)
        scores = torch.cat([scores, sinks], dim=-1)
    weights = scores.softmax(-1)[..., : k.shape[0]]
    return torch.einsum("hrp,phd->rhd", weights, v)
