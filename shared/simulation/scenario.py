"""What is simulated: a TOML file with a section for each kind of facts, checked; bench/configs/paper.toml is one."""

import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, TypeVar

from pydantic import TypeAdapter, ValidationError

from shared.errors import ConfigError
from shared.planning.assemble import MOST, Names
from shared.planning.rivals import Rules

T = TypeVar("T")
NOTES = "reported"
"""A section that is not read: what others report."""


@dataclass(frozen=True)
class Mesh:
    """Model, devices, links and routing, which are the same for every system."""

    model: str
    """A config.json, or a directory with one; relative to the scenario."""
    hardware: str
    link: str
    zipf: float
    used: float = 1.0
    per_node: int = 8
    apart: bool = False
    most: int = MOST

    @property
    def names(self) -> Names:
        return Names(self.hardware, self.hardware, self.link, self.per_node, self.apart)


@dataclass(frozen=True)
class Traffic:
    """Requests: drawn for a day with one peak, or read from a trace."""

    slo_tpot_s: float
    """Per token of the output: of means when planning, of each request when judging."""
    slo_ttft_s: float = 0.0
    """To the first token; 0: any."""
    arrivals: str = ""
    """CSV of requests, relative to the scenario, which then says how many tokens they have; empty: drawn."""
    hours: float = 24.0
    peak: float = 0.0
    """Requests per second. 0: ``peak_share`` of what the largest tier of monoliths serves within the limit."""
    peak_share: float = 0.9
    peak_to_mean: float = 7.5
    prompt: float = 16.0
    """Tokens, mean."""
    output: float = 256.0
    seed: int = 0


@dataclass(frozen=True)
class Scaling:
    """When systems decide, and what a change costs."""

    window_s: float = 900.0
    """From decision to decision."""
    headroom: float = 1.15
    """Rate that is planned for, beside the one that is foreseen."""
    start_s: float = 60.0
    """From a decision until new devices serve; until then, and as long while devices drain, both plans are paid for."""


@dataclass(frozen=True)
class Scenario:
    about: str
    folder: Path
    """Where relative paths begin."""
    mesh: Mesh
    traffic: Traffic
    scaling: Scaling
    rules: Rules


def load_scenario(file: Path) -> Scenario:
    """Raises ConfigError that names the section and the field."""
    try:
        found = tomllib.loads(file.read_text("utf-8"))
    except (OSError, tomllib.TOMLDecodeError) as error:
        raise ConfigError("--scenario", f"{file}: {error}") from error
    sections = {"mesh", "traffic", "scaling", "rules"}
    unknown = sorted(found.keys() - sections - {"about", NOTES})
    if unknown:
        raise ConfigError("--scenario", f"{file}: unknown sections {', '.join(unknown)}")

    def section(name: str, kind: type[T]) -> T:
        return _section(file, name, kind, found.get(name, {}))

    about = str(found.get("about", file.stem))
    mesh, traffic = section("mesh", Mesh), section("traffic", Traffic)
    return Scenario(about, file.parent, mesh, traffic, section("scaling", Scaling), section("rules", Rules))


def _section(file: Path, name: str, kind: type[T], values: Mapping[str, Any]) -> T:
    unknown = sorted(values.keys() - {field.name for field in fields(kind)})  # pyright: ignore[reportArgumentType]
    if unknown:
        raise ConfigError("--scenario", f"{file}: [{name}]: unknown fields {', '.join(unknown)}")
    try:
        return TypeAdapter(kind).validate_python(values)
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(map(str, first["loc"]))
        raise ConfigError("--scenario", f"{file}: [{name}]: {field}: {first['msg'].lower()}") from error
