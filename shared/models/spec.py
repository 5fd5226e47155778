"""What a checkpoint is, as data: filled in by a family (families/), read by the decoder and the experts.

Nothing here knows tensors, devices or files. Defaults are the plain form, so that a family names only what is its own.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class RopeSpec:
    """Rotary position embedding (Su et al., RoFormer). ``kind`` "default" is the unscaled form."""

    theta: float
    dim: int
    """Rotated dimensions of a head; the rest passes through."""
    kind: str = "default"
    """default, linear, yarn, llama3 or longrope; see rope.py."""
    scaling: Mapping[str, Any] = field(default_factory=dict, hash=False)
    """Parameters of the scaled kinds (linear: ``factor``), named as in config.json."""
    interleaved: bool = False
    """Pairs are (2i, 2i + 1), as DeepSeek and Llama-4 store them, not (i, i + dim / 2)."""


@dataclass(frozen=True)
class LatentSpec:
    """Multi-head latent attention (DeepSeek-V2): the cache holds ``rank + rope_dim`` numbers per token and layer."""

    rank: int
    """Of the latent that keys and values are made from."""
    query_rank: int
    """Of the queries' own latent; 0: queries are projected directly."""
    nope_dim: int
    """Dimensions of a head that are not rotated."""
    rope_dim: int
    """Rotated dimensions, shared by all heads of the keys."""
    value_dim: int
    norm_eps: float = 1e-6


@dataclass(frozen=True)
class Temperature:
    """Llama-4's scaling of queries at far positions p: 1 + scale * log(1 + floor((p + 1) / interval))."""

    scale: float
    interval: float


@dataclass(frozen=True)
class AttentionSpec:
    """Attention of one layer: grouped-query, or latent when ``latent`` is set (then kv_heads is 1)."""

    heads: int
    kv_heads: int
    head_dim: int
    scale: float
    rope: RopeSpec | None
    """None: no positions at all (NoPE)."""
    qk_norm: str = ""
    """RMS norm of q and k: "head" (each head, before the rotation: Qwen3), "projection" (all heads at once, before the
    rotation: OLMoE), "l2" (each head without weights, after the rotation: Llama-4)."""
    clip: float = 0.0
    """Largest absolute value of q, k and v after their norms; 0 = any (OLMoE)."""
    bias: bool = False
    """Bias on the q, k and v projections; on the first of each pair of projections of latent attention."""
    out_bias: bool = False
    """Bias on the output projection."""
    window: int = 0
    """Sliding window in tokens; 0 = full."""
    chunk: int = 0
    """Tokens see their own chunk only (Llama-4); 0 = full."""
    sinks: bool = False
    """A learned score per head that takes its share of the softmax and gives nothing (gpt-oss)."""
    temperature: Temperature | None = None
    latent: LatentSpec | None = None


@dataclass(frozen=True)
class RouterSpec:
    """The gate: how scores become k expert ids and weights."""

    experts: int
    top_k: int
    score: str = "softmax"
    """softmax: over all experts, then top-k. sigmoid: each by itself, then top-k. top_softmax, top_sigmoid: top-k of
    the raw scores, then over (or of each of) these. sparsemixer: Phi-3.5-MoE's, see ``Kernels.route``."""
    normalise: bool = True
    """Divide the k weights by their sum."""
    scale: float = 1.0
    """Factor of the weights, after that."""
    bias: bool = False
    """Bias on the raw scores."""
    correction: bool = False
    """A bias per expert that counts for the choice only, not for the weights (DeepSeek-V3)."""
    groups: int = 1
    """Experts lie in this many groups, of which ``top_groups`` may be chosen from (DeepSeek)."""
    top_groups: int = 1
    group_score: str = "max"
    """A group is worth its best score ("max"), or the sum of its two best ("top2")."""
    jitter: float = 0.0
    """Of sparsemixer: relative distance from the best beyond which an expert counts for nothing."""
    weighs_input: bool = False
    """Weights apply to what an expert reads, not to what it gives (Llama-4)."""


@dataclass(frozen=True)
class LayerSpec:
    index: int
    moe: bool
    """False: a dense feed-forward on the attention side."""
    attention: AttentionSpec


@dataclass(frozen=True)
class Stored:
    """How a checkpoint stores the tensor of a role; plain means as the role's shape in layout.py."""

    name: str
    """Pattern with {layer} and {expert}."""
    stacked: bool = False
    """All experts in one tensor, the first dimension counts them."""
    transposed: bool = False
    """[inputs, outputs] instead of [outputs, inputs]."""
    part: str = ""
    """Gate and up share a tensor: "first" or "second" half, or "even" or "odd" rows."""
    packing: str = ""
    """mxfp4: two tensors, NAME_blocks and NAME_scales; see packed.py."""


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
    """silu, gelu (erf form), gelu_pytorch_tanh, or clamped_swiglu (gpt-oss)."""
    norm_eps: float
    tied_head: bool
    max_positions: int
    eos_ids: tuple[int, ...]
    router: RouterSpec
    layers: tuple[LayerSpec, ...]
    names: Mapping[str, Stored]
    """Tensor role -> where it is stored; the roles are those of layout.py."""
    shared_hidden: int = 0
    """Intermediate size of the shared experts together, which every token of a layer with experts goes through."""
    shared_gate: bool = False
    """A sigmoid of a projection of the row weights the shared experts (Qwen2-MoE)."""
    expert_bias: bool = False
    """Biases on gate, up and down of routed experts (gpt-oss)."""
    layer_norm: bool = False
    """Norms are layer norms with bias (Phi-3.5-MoE), not RMS norms."""
    head_bias: bool = False
    embed_scale: float = 1.0
    residual_scale: float = 1.0
    """Factor of what attention and feed-forwards add to the residual stream; of routed experts it is part of
    ``router.scale``."""
    logit_scale: float = 1.0
    fp8_block: tuple[int, int] | None = None
    """Matrices may be stored as FP8 with a scale per block of this shape; see packed.py."""

    @property
    def moe_layers(self) -> tuple[int, ...]:
        return tuple(layer.index for layer in self.layers if layer.moe)
