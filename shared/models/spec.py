"""What a checkpoint is, as data: filled in by a family (families.py), read by the decoder and the experts.

Nothing here knows tensors, devices or files.
"""

from dataclasses import dataclass, field


@dataclass(frozen=True)
class RopeSpec:
    """Rotary position embedding (Su et al., RoFormer). ``kind`` "default" is the unscaled form."""

    theta: float
    dim: int
    """Rotated dimensions of a head; the rest passes through."""
    kind: str = "default"
    scaling: dict[str, float] = field(default_factory=dict, hash=False)
    """Parameters of the scaled kinds (linear: ``factor``), named as in config.json."""


@dataclass(frozen=True)
class AttentionSpec:
    """Grouped-query attention of one layer."""

    heads: int
    kv_heads: int
    head_dim: int
    scale: float
    rope: RopeSpec
    qk_norm: bool = False
    """RMS norm per head on q and k before the rotation (Qwen3)."""
    bias: bool = False
    """Bias on the q, k and v projections."""
    out_bias: bool = False
    """Bias on the output projection."""
    window: int = 0
    """Sliding window in tokens; 0 = full."""


@dataclass(frozen=True)
class RouterSpec:
    """The gate: how scores become k expert ids and weights."""

    experts: int
    top_k: int
    score: str = "softmax"
    """softmax over all experts, then top-k."""
    normalise: bool = True
    """Divide the k weights by their sum."""


@dataclass(frozen=True)
class LayerSpec:
    index: int
    moe: bool
    """False: a dense feed-forward on the attention side."""
    attention: AttentionSpec


@dataclass(frozen=True)
class ModelSpec:
    family: str
    """``model_type`` of config.json."""
    vocab_size: int
    hidden: int
    expert_hidden: int
    """Intermediate size of a routed expert."""
    dense_hidden: int
    """Intermediate size of the feed-forward of layers without experts."""
    activation: str
    """silu, gelu (erf form) or gelu_pytorch_tanh."""
    norm_eps: float
    tied_head: bool
    max_positions: int
    eos_ids: tuple[int, ...]
    router: RouterSpec
    layers: tuple[LayerSpec, ...]
    names: dict[str, str]
    """Tensor role -> name pattern with {layer} and {expert}; the roles are those of layout.py."""

    @property
    def moe_layers(self) -> tuple[int, ...]:
        return tuple(layer.index for layer in self.layers if layer.moe)
