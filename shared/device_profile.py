"""How long a device takes for its share of a layer, as plain numbers: profiles, and the formulas that read them.

The formulas are those of JANUS (arXiv 2512.13525, section 3.5), whose coefficients hold for one device and one model.
Covers built-in profiles and files in JSON or TOML. Who waits for these times is in shared/pace.py. No torch.
"""

import json
import math
import tomllib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from shared.errors import ConfigError

MOST_SECONDS = 1.0
"""Of any single figure: more is a mistake of units, for times are given in seconds."""


@dataclass(frozen=True)
class DeviceProfile:
    """Times of one device; what is 0 takes no time of its own. ``_s`` are seconds, at most MOST_SECONDS each."""

    name: str
    about: str = ""
    """Where the numbers come from, for a person."""
    attention_floor_s: float = 0.0
    """Least time of one layer's attention (c_a)."""
    attention_row_s: float = 0.0
    """Per row (alpha)."""
    attention_position_s: float = 0.0
    """Per row and position that it attends to (c_kv)."""
    shared_s: float = 0.0
    """Shared experts of one layer, which the attention side computes."""
    shared_row_s: float = 0.0
    experts_s: float = 0.0
    """Routed experts of one layer (c_e), however few of them are activated."""
    expert_s: float = 0.0
    """Per distinct activated expert (beta)."""
    head_s: float = 0.0
    """Logits, once per step."""
    head_row_s: float = 0.0
    link_latency_s: float = 0.0
    """One way, per message."""
    link_bytes_per_s: float = 0.0
    """0: unlimited."""
    send_s: float = 0.0
    """How long one message occupies its sender; messages to several peers follow one another."""

    def without_shared(self) -> "DeviceProfile":
        """The same device under a model without shared experts."""
        return replace(self, shared_s=0.0, shared_row_s=0.0)


BUILT_IN: Mapping[str, DeviceProfile] = {
    profile.name: profile
    for profile in (
        DeviceProfile(
            "synthetic-10ms",
            "synthetic: made-up test values of no device; about 10 ms per layer in small batches",
            attention_floor_s=4e-3, attention_row_s=0.1e-3, attention_position_s=0.5e-6, shared_s=1e-3,
            shared_row_s=10e-6, experts_s=3e-3, expert_s=0.5e-3, head_s=2e-3, head_row_s=10e-6, link_latency_s=0.5e-3,
            link_bytes_per_s=1e9,
        ),
        DeviceProfile(
            "synthetic-40ms",
            "synthetic: made-up test values of no device; four times slower than synthetic-10ms, for large pools",
            attention_floor_s=16e-3, attention_row_s=0.4e-3, attention_position_s=2e-6, shared_s=4e-3,
            shared_row_s=40e-6, experts_s=12e-3, expert_s=2e-3, head_s=8e-3, head_row_s=40e-6, link_latency_s=2e-3,
            link_bytes_per_s=0.25e9,
        ),
        DeviceProfile(
            "synthetic-latency-5ms",
            "synthetic: this machine's own speed, but every message takes 5 ms longer",
            link_latency_s=5e-3,
        ),
    )
}  # fmt: skip


# ---- formulas ---------------------------------------------------------------------------------------------


def attention_seconds(profile: DeviceProfile, rows: int, context: float) -> float:
    """One layer's attention of ``rows`` rows that attend to ``context`` positions each, on average."""
    per_row = profile.attention_row_s + profile.attention_position_s * context
    return max(profile.attention_floor_s, rows * per_row)


def shared_seconds(profile: DeviceProfile, rows: int) -> float:
    """Shared experts of one layer."""
    return profile.shared_s + profile.shared_row_s * rows


def experts_seconds(profile: DeviceProfile, activated: int) -> float:
    """Routed experts of one layer on an instance where so many distinct ones are activated."""
    return profile.experts_s + profile.expert_s * activated


def head_seconds(profile: DeviceProfile, rows: int) -> float:
    """Logits of ``rows`` rows."""
    return profile.head_s + profile.head_row_s * rows


def link_seconds(profile: DeviceProfile, nbytes: int) -> float:
    """From the moment a message leaves its sender until it has arrived."""
    transfer = nbytes / profile.link_bytes_per_s if profile.link_bytes_per_s else 0.0
    return profile.link_latency_s + transfer


# ---- reading ----------------------------------------------------------------------------------------------


def load_profile(setting: str, given: str) -> DeviceProfile:
    """A built-in profile by its name, or one from a .json or .toml file.

    Raises ConfigError for the ``setting`` with the file and the key that is wrong.
    """
    if given in BUILT_IN:
        return BUILT_IN[given]
    path = Path(given)
    parse: Callable[[str], Any] | None = {".json": json.loads, ".toml": tomllib.loads}.get(path.suffix)
    if parse is None:
        raise ConfigError(setting, f"{given!r} is neither a .json or .toml file nor one of {', '.join(BUILT_IN)}")
    try:
        values = parse(path.read_text())
    except OSError as error:
        raise ConfigError(setting, f"{path}: {error.strerror}") from error
    except ValueError as error:
        raise ConfigError(setting, f"{path}: not valid {path.suffix[1:].upper()}: {error}") from error
    if not isinstance(values, dict):
        raise ConfigError(setting, f"{path}: not an object with the figures of a profile")
    problem = "; ".join(filter(None, (_problem(key, value) for key, value in values.items())))
    if problem:
        raise ConfigError(setting, f"{path}: {problem}")
    return DeviceProfile(**{"name": path.stem, **values})


def _problem(key: str, value: object) -> str:
    """What is wrong with one entry, "" when nothing is."""
    known = {field.name: field.type for field in fields(DeviceProfile)}
    if key not in known:
        return f"unknown key {key}; known are {', '.join(known)}"
    if known[key] is str:
        return "" if isinstance(value, str) and value else f"{key} is {value!r}, but has to be a text"
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < math.inf:
        return f"{key} is {value!r}, but has to be a number of at least 0"
    if key.endswith("_s") and key != "link_bytes_per_s" and value > MOST_SECONDS:
        return f"{key} is {value!r}, but times are in seconds and at most {MOST_SECONDS:g}"
    return ""
