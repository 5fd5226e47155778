"""Trained predictors on disk: one safetensors file per directory, whose metadata says what they were trained for.

Tensors are named ``LAYER.DISTANCE.PART``; parts as in ``Net``. Matrices are bf16. The metadata is one entry, FORMAT,
with a ``Trained`` as JSON: safetensors writes several in no fixed order.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from shared.errors import MoemeshError
from shared.messages import ModelFacts
from shared.predictors.base import Pair, possible_pairs
from shared.predictors.gates import GatePredictor, Net

FILE = "predictors.safetensors"
FORMAT = "moemesh-predictors"
VERSION = 1


class BadPredictors(MoemeshError):
    """Trained predictors cannot be used: ``where`` is their file or directory."""

    def __init__(self, where: Path, problem: str) -> None:
        super().__init__(f"{where}: {problem}")
        self.where = where
        self.problem = problem


@dataclass(frozen=True)
class Trained:
    """What predictors were trained for."""

    model: str
    digest: str
    """As in ModelFacts."""
    layers: tuple[int, ...]
    """Checkpoint indices of all layers with experts."""
    experts: int
    top_k: int
    hidden: int
    version: int = VERSION

    @classmethod
    def of(cls, facts: ModelFacts, hidden: int) -> "Trained":
        return cls(facts.name, facts.digest, tuple(facts.moe_layers), facts.experts, facts.top_k, hidden)


def save_predictors(directory: Path, trained: Trained, nets: Mapping[Pair, Net]) -> Path:
    """Write the file of a directory, which is made if need be. Returns its path; raises FileExistsError."""
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / FILE
    if path.exists():
        raise FileExistsError(path)
    stored = {pair: net.stored(torch.bfloat16) for pair, net in nets.items()}
    tensors = {f"{la}.{d}.{name}": t for (la, d), net in stored.items() for name, t in net.tensors.items()}
    save_file(tensors, path, {FORMAT: json.dumps(asdict(trained))})
    path.chmod(0o644)  # safetensors makes files that only their owner may read
    return path


def load_predictors(directory: Path, digest: str) -> tuple[Trained, GatePredictor]:
    """The predictors of a directory, for the model with this digest.

    Raises BadPredictors: missing, damaged, of another format, or trained for another model.
    """
    path = directory / FILE
    if not path.is_file():
        raise BadPredictors(directory, f"has no {FILE}; `moemesh predictor train` makes one")
    try:
        with safe_open(path, framework="pt") as file:
            trained = _trained(path, file.metadata() or {}, digest)
            tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118 - not a mapping
    except (SafetensorError, OSError) as error:
        raise BadPredictors(path, f"damaged or cut off ({error})") from error
    return trained, GatePredictor(_nets(path, trained, tensors), trained.top_k)


def _trained(path: Path, metadata: Mapping[str, str], digest: str) -> Trained:
    if FORMAT not in metadata:
        raise BadPredictors(path, "not a file of predictors")
    try:
        fields: dict[str, Any] = json.loads(metadata[FORMAT])
        if fields["version"] != VERSION:
            raise BadPredictors(path, f"version {fields['version']}, this program reads {VERSION}")
        fields["layers"] = tuple(map(int, fields["layers"]))
        trained = Trained(**fields)
    except (KeyError, TypeError, ValueError) as error:
        raise BadPredictors(path, f"its metadata is damaged ({error})") from error
    if trained.digest != digest:
        problem = f"trained for {trained.model} with digest {trained.digest[:12]}, this model's is {digest[:12]}"
        raise BadPredictors(path, f"{problem}: train predictors for it")
    return trained


def _nets(path: Path, trained: Trained, tensors: Mapping[str, Tensor]) -> dict[Pair, Net]:
    """Raises BadPredictors when a tensor is missing, of another shape, or not finite."""
    names = (name.split(".") for name in tensors)
    pairs = {(int(la), int(d)) for la, d, *_ in (n for n in names if len(n) == 3) if la.isdecimal() and d.isdecimal()}
    possible = set(possible_pairs(trained.layers, range(1, len(trained.layers))))
    if not pairs or not pairs <= possible:
        raise BadPredictors(path, f"layers and distances {sorted(pairs - possible)} do not exist")
    return {pair: _net(path, trained, pair, tensors) for pair in sorted(pairs)}


def _net(path: Path, trained: Trained, pair: Pair, tensors: Mapping[str, Tensor]) -> Net:
    experts, hidden, prefix = trained.experts, trained.hidden, f"{pair[0]}.{pair[1]}."
    width = len(tensors[f"{prefix}up"]) if f"{prefix}up" in tensors else 0
    shapes = {"gate": (experts, hidden), "bias": (experts,), "up": (width, hidden), "up_bias": (width,)}
    parts: dict[str, Tensor] = {}
    for name, shape in (shapes | {"down": (experts, width)}).items():
        part = tensors.get(prefix + name, torch.empty(shape) if 0 in shape else torch.empty(0))
        if part.shape != shape or not part.isfinite().all():
            raise BadPredictors(path, f"tensor {prefix}{name} is missing, not {list(shape)}, or not finite")
        parts[name] = part
    return Net(**parts)
