"""How precisely a pool computes. Both pools of a mesh must agree."""

from dataclasses import dataclass

import torch

from shared.errors import ConfigError
from shared.models.layout import tensor_name
from shared.models.loader import Checkpoint

KNOWN = ("auto", "float32", "bfloat16")


@dataclass(frozen=True, slots=True)
class Precision:
    """What follows from ``--dtype``."""

    tensors: torch.dtype
    """Of activations, rows on the wire, the KV cache and, off the CPU, weights."""
    precise: bool
    """On the CPU: rows are multiplied with bf16 weights as they are; else rounded to bf16 for that, where it is faster.

    Sums and all other arithmetic are fp32 either way."""


def choose_precision(setting: str, device: torch.device, checkpoint: Checkpoint) -> Precision:
    """What was asked for, or by default what suits the dtype that the checkpoint stores. Raises ConfigError."""
    if setting not in KNOWN:
        raise ConfigError("--dtype", f"{setting!r} is not one of {', '.join(KNOWN)}")
    stored = checkpoint.tensor(tensor_name(checkpoint.spec, "embed", 0, 0)).dtype
    dtype = stored if setting == "auto" else getattr(torch, setting)
    if device.type == "cpu":
        return Precision(torch.float32, precise=dtype is not torch.bfloat16)
    return Precision(dtype, precise=True)
