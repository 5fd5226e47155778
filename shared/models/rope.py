"""Tables of rotary position embeddings (Su et al., RoFormer), one per RopeSpec."""

import torch
from torch import Tensor

from shared.models.spec import RopeSpec


def rope_tables(spec: RopeSpec, max_positions: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """(cos, sin), each fp32 [max_positions, dim / 2].

    The angle is computed in fp32 as transformers does. Its cosine goes through fp64, because torch's fp32 cosine
    differs in the last bit between its vector loop and the loop's tail, which depends on size and threads.
    """
    inverse = 1.0 / (spec.theta ** (torch.arange(0, spec.dim, 2, dtype=torch.float32) / spec.dim))
    if spec.kind == "linear":
        inverse /= spec.scaling["factor"]
    angle = (torch.arange(max_positions, dtype=torch.float32)[:, None] * inverse).double()
    return angle.cos().float().to(device), angle.sin().float().to(device)
