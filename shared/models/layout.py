"""Which tensors a model consists of: roles, names and shapes, computed from its ModelSpec. No files, no torch.

A role is what the decoder or an expert calls a tensor; its shape here is the one that kernels want. A checkpoint may
store it otherwise (``Stored``), which is undone when it is loaded.
"""

from collections.abc import Iterator, Mapping
from typing import NamedTuple

from shared.models.spec import AttentionSpec, LatentSpec, LayerSpec, ModelSpec, Stored

Shape = tuple[int, ...]
PLAIN = ("F32", "BF16", "F16")
"""Dtypes of tensors that are not packed, as safetensors writes them."""
PACKED = ("U8",)
MXFP4_BLOCK = 32
"""Values of one MXFP4 block: 16 bytes and a scale."""


class Expected(NamedTuple):
    """A tensor that serving reads, as the checkpoint stores it."""

    name: str
    shape: Shape
    dtypes: tuple[str, ...]


def tensor_name(spec: ModelSpec, role: str, layer: int = 0, expert: int = 0) -> str:
    """The checkpoint's name of a role, e.g. ``model.layers.3.mlp.gate.weight`` for ``router``."""
    return spec.names[role].name.format(layer=layer, expert=expert)


def outer_roles(spec: ModelSpec) -> dict[str, Shape]:
    """Tensors outside the layers."""
    roles: dict[str, Shape] = {"embed": (spec.vocab_size, spec.hidden)} | _norm("norm", spec)
    if not spec.tied_head:
        roles |= {"head": (spec.vocab_size, spec.hidden)}
    return roles | ({"head_bias": (spec.vocab_size,)} if spec.head_bias else {})


def decoder_roles(spec: ModelSpec, layer: LayerSpec) -> dict[str, Shape]:
    """Tensors of one layer but its router and routed experts."""
    a = layer.attention
    roles = _norm("input_norm", spec) | _norm("post_norm", spec)
    roles |= _latent(a, a.latent, spec.hidden) if a.latent else _grouped(a, spec.hidden)
    if a.out_bias:
        roles |= {"o_bias": (spec.hidden,)}
    if not layer.moe:
        return roles | feed_forward("dense", spec.dense_hidden, spec.hidden)
    if spec.shared_hidden:
        roles |= feed_forward("shared", spec.shared_hidden, spec.hidden)
    return roles | ({"shared_router": (1, spec.hidden)} if spec.shared_gate else {})


def router_roles(spec: ModelSpec) -> dict[str, Shape]:
    """The gate of one layer."""
    router = spec.router
    roles: dict[str, Shape] = {"router": (router.experts, spec.hidden)}
    roles |= {"router_bias": (router.experts,)} if router.bias else {}
    return roles | ({"router_correction": (router.experts,)} if router.correction else {})


def expert_roles(spec: ModelSpec) -> dict[str, Shape]:
    """The matrices of one routed expert in the order gate, up, down; then its biases in that order, if it has any."""
    roles = feed_forward("expert", spec.expert_hidden, spec.hidden)
    return roles | ({f"{role}_bias": shape[:1] for role, shape in roles.items()} if spec.expert_bias else {})


def expected_tensors(spec: ModelSpec) -> Iterator[Expected]:
    """Every tensor that serving reads, outer tensors first, then layer by layer; some more than once."""
    yield from _expected(spec, outer_roles(spec), 0, 0)
    for layer in spec.layers:
        yield from _expected(spec, decoder_roles(spec, layer), layer.index, 0)
        if layer.moe:
            yield from _expected(spec, router_roles(spec), layer.index, 0)
            for expert in range(spec.router.experts):
                yield from _expected(spec, expert_roles(spec), layer.index, expert)


def _expected(spec: ModelSpec, roles: Mapping[str, Shape], layer: int, expert: int) -> Iterator[Expected]:
    for role, shape in roles.items():
        stored, name = spec.names[role], tensor_name(spec, role, layer, expert)
        shape = _stored_shape(stored, shape, spec.router.experts)
        if stored.packing == "mxfp4":
            blocks = (*shape[:-1], shape[-1] // MXFP4_BLOCK)
            yield Expected(name + "_blocks", (*blocks, MXFP4_BLOCK // 2), PACKED)
            yield Expected(name + "_scales", blocks, PACKED)
        else:
            yield Expected(name, shape, PLAIN)


def _stored_shape(stored: Stored, shape: Shape, experts: int) -> Shape:
    if stored.part:
        shape = (2 * shape[0], *shape[1:])
    if stored.transposed:
        shape = shape[::-1]
    return (experts, *shape) if stored.stacked else shape


def _norm(role: str, spec: ModelSpec) -> dict[str, Shape]:
    return {role: (spec.hidden,)} | ({f"{role}_bias": (spec.hidden,)} if spec.layer_norm else {})


def _grouped(a: AttentionSpec, hidden: int) -> dict[str, Shape]:
    q, kv = a.heads * a.head_dim, a.kv_heads * a.head_dim
    roles: dict[str, Shape] = {"q": (q, hidden), "k": (kv, hidden), "v": (kv, hidden), "o": (hidden, q)}
    if a.bias:
        roles |= {"q_bias": (q,), "k_bias": (kv,), "v_bias": (kv,)}
    if a.qk_norm == "head":
        roles |= {"q_norm": (a.head_dim,), "k_norm": (a.head_dim,)}
    if a.qk_norm == "projection":
        roles |= {"q_norm": (q,), "k_norm": (kv,)}
    return roles | ({"sinks": (a.heads,)} if a.sinks else {})


def _latent(a: AttentionSpec, latent: LatentSpec, hidden: int) -> dict[str, Shape]:
    q, rank, width = a.heads * a.head_dim, latent.rank, latent.rank + latent.rope_dim
    roles: dict[str, Shape] = {"kv_a": (width, hidden), "kv_norm": (rank,), "o": (hidden, a.heads * latent.value_dim)}
    roles |= {"kv_b": (a.heads * (latent.nope_dim + latent.value_dim), rank)}
    roles |= {"kv_a_bias": (width,)} if a.bias else {}
    if not latent.query_rank:
        return roles | {"q": (q, hidden)}
    roles |= {"q_a": (latent.query_rank, hidden), "q_a_norm": (latent.query_rank,), "q_b": (q, latent.query_rank)}
    return roles | ({"q_a_bias": (latent.query_rank,)} if a.bias else {})


def feed_forward(prefix: str, inner: int, hidden: int) -> dict[str, Shape]:
    """gate, up and down of a gated feed-forward."""
    return {f"{prefix}_gate": (inner, hidden), f"{prefix}_up": (inner, hidden), f"{prefix}_down": (hidden, inner)}
