"""Fitted coefficients on disk: JSON with the points that they were fitted to, for one model."""

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter

from shared.errors import MoemeshError
from shared.planning.exchange import Measured
from shared.planning.fit import Fitted, Point

VERSION = 2


class BadProfile(MoemeshError):
    """A file that is no profile, or one of another model; says which and what to do."""


def save_fitted(path: Path, fitted: Fitted, points: Sequence[Point], digest: str) -> None:
    """Raises OSError."""
    coefficients = asdict(fitted) | {"exchange": fitted.exchange._asdict()}
    whole = {"version": VERSION, "model": fitted.sizes.name, "digest": digest, "fitted": coefficients}
    path.write_text(json.dumps(whole | {"points": [asdict(point) for point in points]}, indent=2) + "\n", "utf-8")


def load_fitted(path: Path, digest: str) -> tuple[Fitted, list[Point]]:
    """Coefficients for the model with this digest. Raises BadProfile."""
    try:
        found: dict[str, Any] = json.loads(path.read_text("utf-8"))
        if found["version"] != VERSION:
            raise BadProfile(f"{path}: version {found['version']}, this program reads {VERSION}: profile anew")
        coefficients = found["fitted"] | {"exchange": Measured(**found["fitted"]["exchange"])}
        fitted = TypeAdapter(Fitted).validate_python(coefficients)
        points = TypeAdapter(list[Point]).validate_python(found["points"])
        of, model = str(found["digest"]), str(found["model"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise BadProfile(f"{path}: no profile of `moemesh profile` ({error})") from error
    if of != digest:
        raise BadProfile(f"{path}: fitted to {model}, another model: run `moemesh profile` for this one")
    return fitted, points
