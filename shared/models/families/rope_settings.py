"""Which parameters each kind of scaled rotary embedding takes from config.json. What they do is in rope.py."""

from typing import Any

from shared.errors import UnsupportedModel
from shared.models.families.settings import Settings

KINDS = ("default", "linear", "llama3", "longrope", "yarn")


def rope_scaling(kind: str, p: Settings, c: Settings, dim: int) -> dict[str, Any]:
    """The parameters of ``kind`` out of ``p``, the config's object on rope; ``c`` is the whole config."""
    if kind not in KINDS:
        raise UnsupportedModel(c.where, f"rope type {kind!r} is not supported; supported: {', '.join(KINDS)}")
    if kind == "default":
        return {}
    if kind == "linear":
        return {"factor": p.number("factor")}
    # Phi keeps the trained length beside the object, and means it more
    original = Settings(c.where, {"original_max_position_embeddings": _original(p, c)})
    scaling: dict[str, Any] = {"original": original.count("original_max_position_embeddings")}
    if kind == "llama3":
        return scaling | {key: p.number(key) for key in ("factor", "low_freq_factor", "high_freq_factor")}
    if p.get("factor") is None:
        scaling["factor"] = c.count("max_position_embeddings") / scaling["original"]
    else:
        scaling["factor"] = p.number("factor")
    return scaling | (_long(p, dim) if kind == "longrope" else _yarn(p))


def _original(p: Settings, c: Settings) -> Any:
    outside = c.get("original_max_position_embeddings")
    return outside or p.get("original_max_position_embeddings") or c.get("max_position_embeddings")


def _yarn(p: Settings) -> dict[str, Any]:
    truncate = p.get("truncate")
    return {
        "beta_fast": p.number("beta_fast") if p.get("beta_fast") else 32.0,
        "beta_slow": p.number("beta_slow") if p.get("beta_slow") else 1.0,
        "truncate": True if truncate is None else bool(truncate),
    } | _numbers(p, "attention_factor", "mscale", "mscale_all_dim")


def _long(p: Settings, dim: int) -> dict[str, Any]:
    factors = {}
    for key in ("short_factor", "long_factor"):
        value = p.get(key)
        if not isinstance(value, list) or len(value) != dim // 2 or not all(isinstance(v, int | float) for v in value):
            raise p.error(key, value, f"a list of {dim // 2} numbers")
        factors[key] = tuple(map(float, value))
    return factors | _numbers(p, "attention_factor", "short_mscale", "long_mscale")


def _numbers(p: Settings, *keys: str) -> dict[str, float]:
    """Those of ``keys`` that are set; 0 counts as not set."""
    return {key: p.number(key) for key in keys if p.get(key)}
