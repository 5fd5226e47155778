"""Devices and links by name: published peaks and expected shares of them, from hardware.toml, which has the sources."""

import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, TypeVar

from pydantic import TypeAdapter, ValidationError

from shared.errors import ConfigError

FILE = Path(__file__).with_name("hardware.toml")
PER_NODE = 8
"""Devices of a node, unless somebody says otherwise."""

T = TypeVar("T")


@dataclass(frozen=True)
class Shares:
    """Which part of a peak is reached."""

    weights: float
    cache: float
    compute: float
    link: float
    memory: float
    """Of a device's memory that may be planned with."""


@dataclass(frozen=True)
class Overheads:
    """Seconds that no peak accounts for: kernels that start, packing, the host's turn."""

    attention_s: float
    experts_s: float
    shared_s: float
    head_s: float
    routes_s: float
    """Where attention gates, per exchange."""


@dataclass(frozen=True)
class Device:
    """One kind of device, by the peaks of its data sheet."""

    name: str
    about: str
    memory_bytes: float
    bytes_per_s: float
    flops: float
    """bf16, dense."""
    inside: str
    """The link between devices of a node."""


@dataclass(frozen=True)
class Link:
    """What a message between two devices costs."""

    name: str
    about: str
    bytes_per_s: float
    """One way."""
    latency_s: float
    """From the end of sending to arrival."""
    send_s: float
    """How long a message occupies its sender beside its bytes."""
    per_device: bool = True
    """Every device has an adapter of its own; else those of a node share one."""


@dataclass(frozen=True)
class Hardware:
    """A catalogue of devices and links."""

    shares: Shares
    overheads: Overheads
    devices: Mapping[str, Device]
    links: Mapping[str, Link]

    def device(self, setting: str, name: str) -> Device:
        """Raises ConfigError for the ``setting`` with the names that are known."""
        return _known(setting, name, self.devices)

    def link(self, setting: str, name: str) -> Link:
        """Raises ConfigError as ``device`` does."""
        return _known(setting, name, self.links)


def load_hardware(file: Path = FILE) -> Hardware:
    """Raises ConfigError for a file that is no such catalogue, with the entry that is wrong."""
    try:
        found: Mapping[str, Any] = tomllib.loads(file.read_text("utf-8"))
    except (OSError, tomllib.TOMLDecodeError) as error:
        raise ConfigError("--hardware-file", f"{file}: {error}") from error
    return Hardware(
        _parse(file, "shares", Shares, found.get("shares", {})),
        _parse(file, "overheads", Overheads, found.get("overheads", {})),
        {name: _parse(file, name, Device, {"name": name, **v}) for name, v in found.get("devices", {}).items()},
        {name: _parse(file, name, Link, {"name": name, **v}) for name, v in found.get("links", {}).items()},
    )


def _parse(file: Path, where: str, kind: type[T], values: Mapping[str, Any]) -> T:
    unknown = sorted(values.keys() - {field.name for field in fields(kind)})  # pyright: ignore[reportArgumentType]
    if unknown:
        raise ConfigError("--hardware-file", f"{file}: {where}: unknown fields {', '.join(unknown)}")
    try:
        return TypeAdapter(kind).validate_python(values)
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(map(str, first["loc"]))
        raise ConfigError("--hardware-file", f"{file}: {where}: {field}: {first['msg'].lower()}") from error


def _known(setting: str, name: str, known: Mapping[str, T]) -> T:
    if name not in known:
        raise ConfigError(setting, f"{name!r} is unknown; known are {', '.join(known)}")
    return known[name]
