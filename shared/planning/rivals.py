"""How other systems would size themselves, by the rules that papers state: yardsticks for a search. Pure.

All rules see the same costs, links and demand as we do; they differ in what they may choose, in how they choose
replicas, and in their exchange. Their parameters stand in a scenario (bench/configs/paper.toml). The rules, as JANUS
(arXiv 2512.13525, section 5.1) describes its baselines:

* monolithic tiers (SGLang): the whole model on 8, 16, 32 or 64 devices, each expert once;
* balanced (MegaScale-Infer, arXiv 2504.02263): only meshes whose attention takes about as long as their experts, a
  replica drawn at random, gates on the attention side;
* coarse (xDeepServe, arXiv 2508.02520): instances in units, tokens balanced over replicas, gates on the attention side.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import numpy as np

from shared.planning.amax import monte_carlo
from shared.planning.exchange import ALL_TO_ALL
from shared.planning.outlook import PARTS, Outlook
from shared.planning.plan import Plan
from shared.planning.routing import Routing
from shared.planning.search import MICRO_BATCHES, Space, look_at, plan_at, search, space_of
from shared.planning.setting import Demand, Setting, Slo
from shared.scheduling.policies import Policy

OURS, TIERS, BALANCED, COARSE = "janus", "monolithic-tiers", "balanced", "coarse"
NAMES = (OURS, TIERS, BALANCED, COARSE)
PLAIN = "janus, as published"
"""Ours without what the paper does not have: in whole steps, and with gates on the expert side only."""


@dataclass(frozen=True)
class Rules:
    """Parameters of the rivals."""

    tiers: tuple[int, ...] = (8, 16, 32, 64)
    """Devices of a monolith."""
    attention_unit: int = 4
    """Instances are added by so many (coarse)."""
    expert_unit: int = 4
    micro_batches: int = 1
    """Of their meshes: MegaScale-Infer itself has at least two, JANUS does not say that its own form of it has."""
    slack: float = 0.05
    """By so much more than the evenest (logarithm of the ratio) attention and experts may differ (balanced)."""


@dataclass(frozen=True)
class Systems:
    """Who is compared: the setting of each, and the rules."""

    settings: Mapping[str, Setting]
    rules: Rules
    most: int

    def choose(self, name: str, demand: Demand, slo: Slo, batch: float | None = None) -> Plan | None:
        """What a system takes: by its rule the cheapest that keeps all limits, None where nothing does.

        ``batch``: sequences in decode, given instead of a rate; then the most tokens per second and device.
        """
        setting = self.settings[name]
        if name in (OURS, PLAIN):
            micro_batches = MICRO_BATCHES if name == OURS else (1,)
            space = space_of(setting, self.most, micro_batches, monoliths=False)
            return search(setting, space, demand, slo, batch, top=1).best
        space = self._space(name, setting)
        outlook = look_at(setting, space, demand, slo, batch)
        allowed = (
            _balanced(space, outlook, self.rules.slack) if name == BALANCED else np.ones(len(space.attention), np.bool_)
        )
        return _cheapest(setting, space, outlook, allowed & outlook.feasible)

    def _space(self, name: str, setting: Setting) -> Space:
        if name == TIERS:
            tiers = np.array([tier for tier in self.rules.tiers if tier <= setting.units.most], np.int64)
            return Space(np.ones_like(tiers), tiers, np.zeros_like(tiers))
        space = space_of(setting, self.most, (self.rules.micro_batches,), monoliths=False)
        if name == BALANCED:
            return space
        units = (space.attention % self.rules.attention_unit == 0) & (space.experts % self.rules.expert_unit == 0)
        return space.at(np.flatnonzero(units))


def systems_of(
    setting: Setting, routing: Routing, rules: Rules, most: int, show: Callable[[str, float], None] = lambda *_: None
) -> Systems:
    """Every system on the hardware and with the model of a setting, which is ours. Makes the rivals' tables."""

    def other(policy: Policy) -> Setting:
        tables = monte_carlo(routing, setting.room.slots, most, policy, show=lambda share: show(f"{policy}", share))
        return replace(setting, tables=tables, ways=ALL_TO_ALL)

    plain = replace(setting, ways=tuple(way for way in setting.ways if way.gate == "experts"))
    settings = {
        OURS: setting,
        PLAIN: plain,
        TIERS: setting,
        BALANCED: other(Policy.RANDOM),
        COARSE: other(Policy.TOKENS),
    }
    return Systems(settings, rules, most)


def _balanced(space: Space, outlook: Outlook, slack: float) -> np.ndarray:
    """For each number of expert instances the fewest attention instances that are about as even as any, bool [n]."""
    attention = outlook.parts[PARTS.index("attention")] + outlook.parts[PARTS.index("shared")]
    off = np.abs(np.log(attention / outlook.parts[PARTS.index("experts")]))
    kept = np.zeros(len(off), np.bool_)
    for experts in np.unique(space.experts):
        mine = np.flatnonzero(space.experts == experts)
        even = mine[off[mine] <= off[mine].min() + slack]
        kept[even[np.argmin(space.attention[even])]] = True
    return kept


def _cheapest(setting: Setting, space: Space, outlook: Outlook, allowed: np.ndarray) -> Plan | None:
    """By price per token and second, then by TPOT."""
    mine = np.flatnonzero(allowed)
    if not mine.size:
        return None
    order = np.lexsort((outlook.tpot[mine], np.round(outlook.cost[mine], 12)))
    return plan_at(setting, space, outlook, int(mine[order[0]]))
