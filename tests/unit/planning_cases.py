"""Settings for the tests of planning: real models from their configs, tables of the bound unless others are given."""

from dataclasses import replace
from pathlib import Path

from shared.models.families import parse_config
from shared.models.presets import PRESETS
from shared.planning.assemble import Names, assemble
from shared.planning.hardware import Hardware, load_hardware
from shared.planning.routing import Routing
from shared.planning.setting import Setting
from shared.planning.sizes import Sizes, read_sizes, sizes_of

DEEPSEEK_V2 = Path(__file__).parents[2] / "bench" / "configs" / "deepseek-v2.json"


def deepseek() -> Sizes:
    return read_sizes(DEEPSEEK_V2)


def small() -> Sizes:
    """A model of 0.9 B parameters, which any device holds."""
    return sizes_of(parse_config(PRESETS["bench-1b"], {}, "bench-1b"), "bench-1b")


def setting(
    sizes: Sizes | None = None, device: str = "h100", routing: Routing | None = None, most: int = 64, **names: object
) -> Setting:
    """A model on one kind of device."""
    chosen = replace(Names(device, device), **names)  # pyright: ignore[reportArgumentType]
    return assemble(load_hardware(), sizes or deepseek(), chosen, routing, most=most)


def squeezed(hardware: Hardware, device: str, share: float) -> Hardware:
    """The catalogue with less memory on one device."""
    less = replace(hardware.devices[device], memory_bytes=hardware.devices[device].memory_bytes * share)
    return replace(hardware, devices={**hardware.devices, device: less})
