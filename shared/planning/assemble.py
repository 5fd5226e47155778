"""From names to a setting: hardware out of the catalogue, sizes of a model, tables of a_max."""

from collections.abc import Callable
from dataclasses import dataclass, replace

from shared.errors import ConfigError
from shared.planning.amax import BOUND, Amax, bound_table, monte_carlo
from shared.planning.coefficients import costs_of
from shared.planning.exchange import Fabric
from shared.planning.hardware import PER_NODE, Hardware, Link
from shared.planning.memory import least_experts, room_of
from shared.planning.routing import Routing
from shared.planning.setting import Setting
from shared.planning.sizes import Sizes
from shared.scheduling.policies import Policy

MOST = 64
"""Instances of a pool, which is also what a placement takes."""

Show = Callable[[str, float], None]
"""Is told what is under way, and which share of it is done."""


@dataclass(frozen=True)
class Names:
    """What hardware is meant, as a person names it."""

    attention: str
    experts: str
    link: str = "infiniband"
    """Between nodes."""
    per_node: int = PER_NODE
    apart: bool = False
    """The pools never share a node."""
    attention_price: float = 1.0
    expert_price: float = 1.0


def assemble(
    hardware: Hardware, sizes: Sizes, names: Names, routing: Routing | None, *, most: int = MOST,
    tables: Amax | None = None, show: Show = lambda _what, _share: None,
) -> Setting:  # fmt: skip
    """The setting of a model on named hardware.

    Args:
        routing: what tables are made from; None: the bound.
        most: instances of a pool.
        tables: of expert instances, if they have been made before.

    Raises:
        ConfigError: unknown names, experts that do not fit, tables of another setting.
    """
    alike = "--hardware" if names.attention == names.experts else ""
    attention = hardware.device(alike or "--attention-hardware", names.attention)
    experts = hardware.device(alike or "--expert-hardware", names.experts)
    between = hardware.link("--link", names.link)
    room = room_of(hardware.shares, sizes, attention, experts)
    least = least_experts(room, sizes)
    if not 1 <= least <= most:
        fits = f"an instance holds {room.slots} of {sizes.experts} experts per layer"
        raise ConfigError("--expert-hardware", f"{names.experts}: {fits}, and {most} instances are too few for them")
    inside = min((hardware.link("inside", device.inside) for device in (attention, experts)), key=_speed)
    apart = names.apart or names.attention != names.experts
    shares, overheads = hardware.shares, hardware.overheads
    fabric = Fabric(inside, between, names.per_node, shares.link, overheads.routes_s, apart)
    if tables is None:
        tables = experts_table(routing, sizes, room.slots, most, lambda share: show("tables of a_max", share))
    check(tables, sizes, room.slots)
    setting = Setting(
        sizes, costs_of(hardware, sizes, attention, experts), fabric, room, tables,
        units_table(routing, sizes, most, lambda share: show("tables of monoliths", share)),
        names.attention_price, names.expert_price,
    )  # fmt: skip
    if names.attention == names.experts:
        return setting
    alone = replace(setting, costs=costs_of(hardware, sizes, attention, attention))
    return replace(setting, monolith=replace(alone, room=room_of(shares, sizes, attention, attention)))


def experts_table(routing: Routing | None, sizes: Sizes, slots: int, most: int, show: Callable[[float], None]) -> Amax:
    """Of expert instances with activation scheduling."""
    if routing is None:
        return bound_table(sizes.experts, sizes.top_k, slots, most)
    return monte_carlo(routing, slots, most, show=show)


def units_table(routing: Routing | None, sizes: Sizes, most: int, show: Callable[[float], None]) -> Amax:
    """Of monoliths: each expert once, in order."""
    if routing is None:
        return bound_table(sizes.experts, sizes.top_k, sizes.experts, most)
    return monte_carlo(routing, sizes.experts, most, Policy.FIRST, show=show)


def check(tables: Amax, sizes: Sizes, slots: int) -> None:
    """Refuse tables of another model, of other slots or of another choice of replicas. Raises ConfigError."""
    theirs, ours = (tables.experts, tables.top_k), (sizes.experts, sizes.top_k)
    if theirs != ours:
        told, here = ("{1} of {0}".format(*numbers) for numbers in (theirs, ours))
        raise ConfigError("--tables", f"they are of another model, with {told} experts for each row: here it is {here}")
    foreign = sorted(set(tables.layers) - set(sizes.moe_layers))
    if foreign:
        raise ConfigError("--tables", f"they are of another model: layer {foreign[0]} of this one has no experts")
    if tables.slots != slots:
        raise ConfigError("--tables", f"they are of {tables.slots} slots, here instances have {slots}")
    if tables.policy not in (Policy.ACTIVATED.value, BOUND):
        raise ConfigError("--tables", f"replicas are chosen by {tables.policy} there, here by {Policy.ACTIVATED.value}")


def _speed(link: Link) -> float:
    return link.bytes_per_s
