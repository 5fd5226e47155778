"""Schema violations in words: which field, what is wrong. At most ten, no values, no types of ours."""

from collections.abc import Iterable
from typing import Any

SHOWN = 10
_UNION_TAGS = frozenset({"str", "int", "float", "bool", "nullable"})
_MAPPINGS = frozenset({"logit_bias", "metadata"})
"""Fields whose keys are data, not fields."""
Loc = tuple[int | str, ...]


def describe(errors: list[Any]) -> tuple[str, str | None]:
    """(message, first field without indices) for pydantic's ``errors()``; unknown fields come first."""
    ordered = sorted(_telling(errors), key=lambda e: e["type"] != "extra_forbidden")
    reasons: dict[str, str] = {}
    for error in ordered:
        reasons.setdefault(_where(error), _reason(error))
    lines = [f"{path}: {reason}" if path else reason for path, reason in list(reasons.items())[:SHOWN]]
    if len(reasons) > SHOWN:
        lines.append(f"and {len(reasons) - SHOWN} more")
    return "; ".join(lines), next((path.split("[")[0] for path in reasons if path), None)


def field_path(loc: Loc) -> str:
    """``("messages", 0, "content")`` -> ``messages[0].content``; pydantic's union branches are left out."""
    path = ""
    for part in loc:
        if isinstance(part, int):
            path += f"[{part}]"
        elif path in _MAPPINGS:
            return path
        elif not _is_branch(part):
            path += f".{part}" if path else part
    return path


def _telling(errors: Iterable[Any]) -> list[Any]:
    """Of a union's errors, one set per branch, those of the branch that the client came closest to."""
    best: dict[Loc, tuple[int, bool]] = {}
    for error in errors:
        root, rank = _union_root(error["loc"]), _rank(error)
        best[root] = max(best.get(root, rank), rank)
    return [e for e in errors if not _in_union(e["loc"]) or _rank(e) == best[_union_root(e["loc"])]]


def _rank(error: Any) -> tuple[int, bool]:
    """Deeper is closer; a value of the right type that is out of range is closer than a wrong type."""
    return len(error["loc"]), not error["type"].endswith("_type")


def _union_root(loc: Loc) -> Loc:
    branch = next((i for i, part in enumerate(loc) if isinstance(part, str) and _is_branch(part)), len(loc))
    return loc[:branch]


def _in_union(loc: Loc) -> bool:
    return len(_union_root(loc)) < len(loc)


def _is_branch(part: str) -> bool:
    return part in _UNION_TAGS or "[" in part or "-" in part


def _where(error: Any) -> str:
    """An unknown field is named exactly as the client wrote it."""
    if error["type"] != "extra_forbidden":
        return field_path(error["loc"])
    parent, name = field_path(error["loc"][:-1]), str(error["loc"][-1])[:100]
    return f"{parent}.{name}" if parent else name


def _reason(error: Any) -> str:
    if error["type"] == "extra_forbidden":
        return "unknown field"
    if error["type"] == "missing":
        return "this field is required"
    message = error["msg"].removeprefix("Value error, ")
    return message[:1].lower() + message[1:]
