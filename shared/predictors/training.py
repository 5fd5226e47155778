"""From recorded rows to tuned gates: which pairs to fine-tune, and how. Seeded, and the same on every run of a machine.

Layer-aware as in MoEless (arXiv 2603.06350, section 4.1): a copy of the gate is judged first, and fine-tuned only where
its recall is below a threshold; elsewhere only the scale and the offset of its scores are fitted, which changes no rank
but makes probabilities of them.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits as cross_entropy

from shared.predictors.gates import Net
from shared.predictors.metrics import hits

_WARM_UP, _DECAY = 50, 0.01
_START = -2.0
"""Log-odds that a score of 0 stands for before training: about one choice in eight."""


@dataclass(frozen=True)
class Training:
    """How nets are trained."""

    threshold: float = 0.9
    """Recall of the copy below which a pair is fine-tuned; the paper's example is 0.8."""
    width: int = 64
    """Hidden units of the feed-forward beside the gate; 0: none, as in the paper."""
    epochs: int = 6
    batch: int = 1024
    """Rows of a step."""
    rate: float = 2e-3
    """Highest learning rate of AdamW; falls to 0 along a cosine."""
    seed: int = 0


@dataclass(frozen=True, eq=False)
class Examples:
    """Rows at one layer and what they chose at a later one."""

    rows: NDArray[np.float16]
    """[N, H]"""
    chosen: NDArray[np.integer]
    """[N, k]"""

    def batch(self, numbers: NDArray[np.int64], experts: int) -> tuple[Tensor, Tensor]:
        """(rows fp32 [B, H], 1 where chosen fp32 [B, E])"""
        rows = torch.from_numpy(self.rows[numbers].astype(np.float32))
        chosen = torch.from_numpy(self.chosen[numbers].astype(np.int64))
        return rows, torch.zeros(len(numbers), experts).scatter_(1, chosen, 1.0)


def recall_of(net: Net, examples: Examples, rows: int = 1 << 14) -> float:
    """Recall (metrics.py) of a net on at most so many examples, evenly spread."""
    some = np.unique(np.linspace(0, len(examples.rows) - 1, min(rows, len(examples.rows))).astype(np.int64))
    x, _ = examples.batch(some, len(net.bias))
    return hits(_scores(_floats(net), x).numpy(), examples.chosen[some].astype(np.int32)) / examples.chosen[some].size


def fit(copy: Net, examples: Examples, training: Training, tune: bool) -> Net:
    """The net in fp32: the whole of it fine-tuned from ``copy``, or only its scale and offset."""
    return _tuned(copy, examples, training) if tune else _scaled(copy, examples, training)


def _tuned(copy: Net, examples: Examples, training: Training) -> Net:
    parts = _widened(_floats(copy), training.width, torch.Generator().manual_seed(training.seed))
    _descend(lambda x: _scores(parts, x), list(parts.values()), examples, training, len(copy.bias))
    return Net(**{name: tensor.detach() for name, tensor in parts.items()})


def _scaled(copy: Net, examples: Examples, training: Training) -> Net:
    parts, scale, offset = _floats(copy), torch.ones(()), torch.full((), _START)
    _descend(lambda x: scale * _scores(parts, x) + offset, [scale, offset], examples, training, len(copy.bias))
    changed = {"gate": parts["gate"] * scale, "bias": parts["bias"] * scale + offset}
    return Net(**{name: tensor.detach() for name, tensor in (parts | changed).items()})


def _descend(
    scores: Callable[[Tensor], Tensor], learned: list[Tensor], examples: Examples, training: Training, experts: int
) -> None:
    """AdamW on the cross entropy of every (row, expert): whose optimum says how likely each choice is."""
    for tensor in learned:
        tensor.requires_grad_()
    optimizer = torch.optim.AdamW(learned, training.rate, weight_decay=_DECAY)
    steps = max(1, len(examples.rows) // training.batch) * training.epochs
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _rate(step, steps))
    rng = np.random.default_rng(training.seed)
    order = np.empty(0, np.int64)
    for _ in range(steps):
        if len(order) < min(training.batch, len(examples.rows)):
            order = rng.permutation(len(examples.rows))
        numbers, order = np.sort(order[: training.batch]), order[training.batch :]
        x, wanted = examples.batch(numbers, experts)
        optimizer.zero_grad()
        cross_entropy(scores(x), wanted).backward()
        optimizer.step()
        schedule.step()


def _rate(step: int, steps: int) -> float:
    return min(1.0, (step + 1) / _WARM_UP) * 0.5 * (1 + np.cos(np.pi * step / steps))


def _scores(parts: dict[str, Tensor], x: Tensor) -> Tensor:
    scores = x @ parts["gate"].T + parts["bias"]
    if len(parts["up"]):
        scores = scores + torch.relu(x @ parts["up"].T + parts["up_bias"]) @ parts["down"].T
    return scores


def _floats(net: Net) -> dict[str, Tensor]:
    """Without the correction: it is trained into the bias."""
    return {name: getattr(net, name).detach().float() for name in ("gate", "bias", "up", "up_bias", "down")}


def _widened(start: dict[str, Tensor], width: int, generator: torch.Generator) -> dict[str, Tensor]:
    """A copy with ``width`` random hidden units that say nothing yet."""
    experts, hidden = start["gate"].shape
    return {
        "gate": start["gate"].clone(),
        "bias": start["bias"] + _START,
        "up": torch.randn(width, hidden, generator=generator) / hidden**0.5,
        "up_bias": torch.zeros(width),
        "down": torch.zeros(experts, width),
    }
