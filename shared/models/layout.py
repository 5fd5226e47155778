"""Which tensors a model consists of: roles, names and shapes, computed from its ModelSpec. No files, no torch."""

from collections.abc import Iterator

from shared.models.spec import LayerSpec, ModelSpec

Shape = tuple[int, ...]


def tensor_name(spec: ModelSpec, role: str, layer: int = 0, expert: int = 0) -> str:
    """The checkpoint's name of a role, e.g. ``model.layers.3.mlp.gate.weight`` for ``router``."""
    return spec.names[role].format(layer=layer, expert=expert)


def outer_roles(spec: ModelSpec) -> dict[str, Shape]:
    """Tensors outside the layers."""
    roles: dict[str, Shape] = {"embed": (spec.vocab_size, spec.hidden), "norm": (spec.hidden,)}
    return roles if spec.tied_head else roles | {"head": (spec.vocab_size, spec.hidden)}


def decoder_roles(spec: ModelSpec, layer: LayerSpec) -> dict[str, Shape]:
    """Tensors of one layer but its router and routed experts."""
    a, hidden = layer.attention, spec.hidden
    q, kv = a.heads * a.head_dim, a.kv_heads * a.head_dim
    roles: dict[str, Shape] = {"input_norm": (hidden,), "q": (q, hidden), "k": (kv, hidden), "v": (kv, hidden)}
    roles |= {"o": (hidden, q), "post_norm": (hidden,)}
    if a.bias:
        roles |= {"q_bias": (q,), "k_bias": (kv,), "v_bias": (kv,)}
    if a.out_bias:
        roles |= {"o_bias": (hidden,)}
    if a.qk_norm:
        roles |= {"q_norm": (a.head_dim,), "k_norm": (a.head_dim,)}
    return roles if layer.moe else roles | _feed_forward("dense", spec.dense_hidden, hidden)


def expert_roles(spec: ModelSpec) -> dict[str, Shape]:
    """The three matrices of one routed expert, in the order gate, up, down."""
    return _feed_forward("expert", spec.expert_hidden, spec.hidden)


def expected_tensors(spec: ModelSpec) -> Iterator[tuple[str, Shape]]:
    """Every tensor that serving reads: (name, shape), outer tensors first, then layer by layer."""
    for role, shape in outer_roles(spec).items():
        yield tensor_name(spec, role), shape
    for layer in spec.layers:
        for role, shape in decoder_roles(spec, layer).items():
            yield tensor_name(spec, role, layer.index), shape
        if layer.moe:
            yield tensor_name(spec, "router", layer.index), (spec.router.experts, spec.hidden)
            yield from _expert_tensors(spec, layer.index)


def _expert_tensors(spec: ModelSpec, layer: int) -> Iterator[tuple[str, Shape]]:
    for expert in range(spec.router.experts):
        for role, shape in expert_roles(spec).items():
            yield tensor_name(spec, role, layer, expert), shape


def _feed_forward(prefix: str, inner: int, hidden: int) -> dict[str, Shape]:
    return {f"{prefix}_gate": (inner, hidden), f"{prefix}_up": (inner, hidden), f"{prefix}_down": (hidden, inner)}
