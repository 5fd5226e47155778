"""Predictors that are gates: copies of the target layer's gate that read the rows of an earlier layer.

MoEless (arXiv 2603.06350, section 4.1) copies the gate of layer l + d and fine-tunes it. Ours may have a small
feed-forward beside the copy, as in PROBE (arXiv 2602.00509), and says how likely a choice is, so that loads are sums of
probabilities instead of counts of guesses.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from shared.kernels.cpu_checks import expect, located
from shared.kernels.cpu_linear import compile_project
from shared.kernels.cpu_predict import predict_loads, predict_scores
from shared.models.layout import router_roles
from shared.models.loader import Checkpoint
from shared.predictors.base import Pair, possible_pairs, target


def _none() -> Tensor:
    return torch.empty(0)


@dataclass(frozen=True, eq=False)
class Net:
    """Scores of rows x [T, H]: x @ gate.T + bias + relu(x @ up.T + up_bias) @ down.T. Matrices share a dtype."""

    gate: Tensor
    """[E, H], fp32, bf16 or fp16"""
    bias: Tensor
    """fp32 [E]"""
    up: Tensor
    """[M, H]; M may be 0: a gate alone."""
    up_bias: Tensor
    """fp32 [M]"""
    down: Tensor
    """[E, M]"""
    correction: Tensor = field(default_factory=_none)
    """fp32 [E]: the choice is by sigmoid(score) + correction; [0]: by the score."""

    @property
    def tensors(self) -> dict[str, Tensor]:
        """By name, without those that are empty."""
        return {name: tensor for name, tensor in vars(self).items() if tensor.numel()}

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors.values())

    def stored(self, dtype: torch.dtype) -> "Net":
        """With matrices in ``dtype``, contiguous."""
        gate, up, down = (t.detach().to(dtype).contiguous() for t in (self.gate, self.up, self.down))
        bias, up_bias, correction = (t.detach().float().contiguous() for t in self._vectors)
        return Net(gate, bias, up, up_bias, down, correction)

    @property
    def _vectors(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.bias, self.up_bias, self.correction


def copied_gate(checkpoint: Checkpoint, layer: int) -> Net:
    """The gate of ``layer`` as it is, in fp32."""
    cpu = torch.device("cpu")
    loaded = {role: checkpoint.load(role, layer, 0, cpu, torch.float32) for role in router_roles(checkpoint.spec)}
    gate = loaded["router"].float().contiguous()
    experts, hidden = gate.shape
    bias = loaded.get("router_bias", torch.zeros(experts)).float()
    correction = loaded.get("router_correction", torch.empty(0)).float()
    return Net(gate, bias, torch.empty(0, hidden), torch.empty(0), torch.empty(experts, 0), correction)


class GatePredictor:
    """``Predictor`` from a net for each pair. Compiles, or loads from the cache, when it is made.

    Args:
        soft: scores are log-odds of being chosen; loads are sums of these probabilities. Else every row counts for its
            ``top_k`` best experts.
    """

    def __init__(self, nets: Mapping[Pair, Net], top_k: int, soft: bool = True) -> None:
        self.nets, self._top_k, self._soft = dict(nets), top_k, soft
        self._project = compile_project()
        self._calls = {pair: _arguments(net) for pair, net in self.nets.items()}
        self._loads = {pair: np.empty(len(net.bias), np.float32) for pair, net in self.nets.items()}
        for (layer, distance), net in self.nets.items():
            self.loads(layer, distance, np.zeros((1, net.gate.shape[1]), np.float32), np.zeros((1, top_k), np.int32))

    @property
    def pairs(self) -> frozenset[Pair]:
        return frozenset(self.nets)

    @property
    def nbytes(self) -> int:
        return sum(net.nbytes for net in self.nets.values()) + sum(loads.nbytes for loads in self._loads.values())

    def observe(self, layer: int, ids: NDArray[np.int32]) -> None:
        """Nothing: what was is not looked at."""

    def scores(
        self, layer: int, distance: int, rows: NDArray[np.float32], ids: NDArray[np.int32]
    ) -> NDArray[np.float32]:
        weights, biases, correction, sizes = self._calls[layer, distance]
        scores = np.empty((len(rows), sizes[1]), np.float32)
        if len(rows):
            _check(rows, sizes[0])
            at = rows.ctypes.data
            predict_scores(self._project.address, at, len(rows), weights, biases, correction, sizes, scores)
        return scores

    def loads(
        self, layer: int, distance: int, rows: NDArray[np.float32], ids: NDArray[np.int32]
    ) -> NDArray[np.float32]:
        weights, biases, correction, sizes = self._calls[layer, distance]
        loads = self._loads[layer, distance]
        _check(rows, sizes[0])
        more = (weights, biases, correction, sizes, self._top_k, self._soft, loads)
        predict_loads(self._project.address, rows.ctypes.data, len(rows), *more)
        return loads


def untuned_gates(checkpoint: Checkpoint, distances: Iterable[int]) -> GatePredictor:
    """The baseline: gates as they are, each row counting for its best experts. Groups of experts are not looked at."""
    layers = checkpoint.spec.moe_layers
    gates = {layer: copied_gate(checkpoint, layer) for layer in layers}
    pairs = possible_pairs(layers, distances)
    return GatePredictor({pair: gates[target(layers, *pair)] for pair in pairs}, checkpoint.spec.router.top_k, False)


def _check(rows: NDArray[np.float32], hidden: int) -> None:
    plain = rows.dtype == np.float32 and rows.flags.c_contiguous and rows.ndim == 2
    expect(plain and rows.shape[1] == hidden, "rows must be fp32 [T, {}], contiguous", hidden)


def _arguments(net: Net) -> tuple[tuple[int, ...], tuple[NDArray, NDArray], NDArray, tuple[int, int, int]]:
    """(weights, biases, correction, sizes) as kernels take them; the net keeps what is at these addresses."""
    (gate, kind), (up, _), (down, _) = located(net.gate), located(net.up), located(net.down)
    (experts, hidden), width = net.gate.shape, len(net.up)
    biases = net.bias.numpy(), net.up_bias.numpy()
    return (gate, up, down, kind), biases, net.correction.numpy(), (hidden, experts, width)
