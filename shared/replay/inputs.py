"""The inputs of a replay: what devices, links, memory and starts cost. One file, inputs.toml, for every policy."""

import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path

from pydantic import TypeAdapter, ValidationError

from shared.errors import ConfigError, MoemeshError

FILE = Path(__file__).with_name("inputs.toml")
COEFFICIENTS = ("row_s", "replica_s", "linear_row_s", "link_row_s", "misc_s", "warm_bytes_per_s")
"""What sensitivity is asked of."""


@dataclass(frozen=True)
class Inputs:
    """One profile. The paper's names (MoEless, section 3.3) in brackets. All instances are alike."""

    name: str
    about: str
    instances: int
    layers: int
    """MoE layers; the recorded ones are tiled when these are more. 0: as many as were recorded."""
    row_s: float
    """Time of one row of one expert, beside ``replica_s``."""
    replica_s: float
    """Time for reading the weights of an activated replica once; the paper has none."""
    linear_row_s: float
    """Time of one row in the paper's formula, where nothing else costs time (alpha)."""
    link_row_s: float
    """Time of one row on an instance's link, one way (beta)."""
    misc_s: float
    """Everything else of a layer: attention, gate (T_misc). Not a part of the MoE-layer time."""
    misc_bytes: float
    """Memory of everything else (M_misc), all instances together."""
    expert_bytes: float
    """(M_e)"""
    instance_bytes: float
    """Memory for experts on each instance (M_g)."""
    cap_bytes: float
    """Memory for a layer's replicas beyond the first, in the paper's scaler (M_cap)."""
    eplb_extra: int
    """Replicas beyond the first that EPLB has on each instance for each layer."""
    start_s: float
    """Of each start, beside moving its bytes. An instance starts one expert after the other."""
    warm_bytes_per_s: float
    """From host memory."""
    start_share: float
    """How much a start slows its instance's computation down meanwhile: 1 takes all of its time, 0 none."""
    cold_bytes_per_s: float
    """From storage: the first start of an expert."""
    max_num_seqs: int
    max_batched_tokens: int
    mixed_prefill: int

    @property
    def slots(self) -> int:
        """Replicas that fit on one instance, of all layers."""
        return int(self.instance_bytes // self.expert_bytes)

    @property
    def warm_s(self) -> float:
        return self.start_s + self.expert_bytes / self.warm_bytes_per_s

    @property
    def cold_s(self) -> float:
        return self.start_s + self.expert_bytes / self.cold_bytes_per_s

    def scaled(self, coefficient: str, factor: float) -> "Inputs":
        """The same with one of COEFFICIENTS times a factor."""
        return replace(self, **{coefficient: getattr(self, coefficient) * factor})


class BudgetTooSmall(MoemeshError):
    """A memory budget cannot hold what one row of one layer needs."""

    def __init__(self, given: float, smallest: float, why: str) -> None:
        super().__init__(
            f"a budget of {given:.4g} bytes is too small: {why} needs {smallest:.0f}, the smallest that works"
        )
        self.smallest = smallest


def load_inputs(name: str, file: Path = FILE) -> Inputs:
    """A profile by its name. Raises ConfigError for an unknown one, or for a file that is none."""
    profiles = _read(file)
    if name not in profiles:
        raise ConfigError("--profile", f"{name!r} is not in {file.name}: there are {', '.join(sorted(profiles))}")
    given = dict(profiles[name])
    unknown = sorted(given.keys() - {field.name for field in fields(Inputs)})
    if unknown:
        raise ConfigError("--profile", f"{name} in {file.name}: unknown fields {', '.join(unknown)}")
    try:
        return TypeAdapter(Inputs).validate_python({"name": name, **given})
    except ValidationError as error:
        first = error.errors()[0]
        raise ConfigError("--profile", f"{name} in {file.name}: {first['loc'][0]}: {first['msg'].lower()}") from error


def _read(file: Path) -> Mapping[str, Mapping[str, object]]:
    try:
        return tomllib.loads(file.read_text("utf-8"))
    except (OSError, tomllib.TOMLDecodeError) as error:
        raise ConfigError("--inputs", f"{file}: {error}") from error
