"""Which dtype a pool computes in: activations, rows on the wire, the KV cache and, off the CPU, weights."""

import torch

from shared.errors import ConfigError
from shared.models.layout import tensor_name
from shared.models.loader import Checkpoint


def compute_dtype(setting: str, device: torch.device, checkpoint: Checkpoint) -> torch.dtype:
    """float32 on the CPU, what the checkpoint stores elsewhere, or what was asked for. Raises ConfigError."""
    stored = checkpoint.tensor(tensor_name(checkpoint.spec, "embed", 0, 0)).dtype
    automatic = torch.float32 if device.type == "cpu" else stored
    known = {"auto": automatic, "float32": torch.float32, "bfloat16": torch.bfloat16}
    if setting not in known:
        raise ConfigError("--dtype", f"{setting!r} is not one of {', '.join(known)}")
    if device.type == "cpu" and known[setting] is not torch.float32:
        raise ConfigError("--dtype", f"{setting} needs a GPU; the CPU computes in float32 whatever the weights are")
    return known[setting]
