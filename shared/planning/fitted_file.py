"""Fitted coefficients on disk: JSON with the points that they were fitted to, for one model."""

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from shared.errors import MoemeshError
from shared.planning.fit import Fitted, Point

VERSION = 1


class BadProfile(MoemeshError):
    """A file that is no profile, or one of another model; says which and what to do."""


def save_fitted(path: Path, fitted: Fitted, points: Sequence[Point], model: str, digest: str) -> None:
    """Raises OSError."""
    facts = {"version": VERSION, "model": model, "digest": digest}
    whole = facts | {"fitted": asdict(fitted), "points": [asdict(point) for point in points]}
    path.write_text(json.dumps(whole, indent=2) + "\n", "utf-8")


def load_fitted(path: Path, digest: str) -> tuple[Fitted, list[Point]]:
    """Coefficients for the model with this digest. Raises BadProfile."""
    try:
        found: dict[str, Any] = json.loads(path.read_text("utf-8"))
        if found["version"] != VERSION:
            raise BadProfile(f"{path}: version {found['version']}, this program reads {VERSION}")
        coefficients = found["fitted"]
        coefficients["expert_s"] = {int(n): float(s) for n, s in coefficients["expert_s"].items()}
        fitted, points = Fitted(**coefficients), [Point(**point) for point in found["points"]]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise BadProfile(f"{path}: no profile of `moemesh profile` ({error})") from error
    if found["digest"] != digest:
        raise BadProfile(f"{path}: fitted to {found['model']}, another model: run `moemesh profile` for this one")
    return fitted, points
