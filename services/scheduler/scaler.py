"""The slow loop of elastic experts: hears what is foreseen, and finds homes that follow it. Writes nothing."""

import asyncio
import logging
import time
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from services.scheduler.foresight import Foresight
from services.scheduler.rebalance import Costs, Move
from services.scheduler.scaling import Loads, Room, Traffic, followed
from services.scheduler.window import Window
from shared.config import SchedulerConfig
from shared.errors import BadMessage
from shared.lifecycle import Instance
from shared.load_messages import Foreseen
from shared.membership import Member
from shared.messages import Placement

LATEST, TOGETHER = 128, 16
"""Exchanges that were activated last, and how many make a sample: what counts where nothing is foreseen."""

log = logging.getLogger(__name__)


def samples_of(active: NDArray[np.bool_]) -> Loads:
    """Means [samples, experts] of TOGETHER exchanges, from all of the time, of active bool [exchanges, experts]."""
    count = max(1, len(active) // TOGETHER)
    return np.stack([active[first::count].mean(axis=0) for first in range(count)])


class Scaler:
    """Make it, then ``subscribe``. Belongs to the asyncio thread.

    Args:
        window: which experts exchanges have activated.
    """

    def __init__(self, instance: Instance, config: SchedulerConfig, window: Window) -> None:
        self._instance, self._window = instance, window
        self._targets_s = config.target_layer_ms / 1e3, config.target_prefill_layer_ms / 1e3
        self._foresight = Foresight(apart=config.target_prefill_layer_ms > 0)

    async def subscribe(self) -> None:
        """Raises BusUnavailable."""
        await self._instance.bus.subscribe(self._instance.subjects.foreseen, Foreseen, self._foreseen, ordered=True)

    async def moves(self, committed: Placement, members: Sequence[Member]) -> list[Move]:
        """What is worth a new placement. ``members``: the instances of the placement, all of them elastic."""
        if len(members) < len(committed.instances):
            return []  # there will be a placement without who is gone
        costs = Costs.of(members)
        room = Room.of(members, len(committed.moe_layers))
        known = {layer: self._traffic(layer, committed.experts, costs) for layer in committed.moe_layers}
        return await asyncio.to_thread(followed, committed, known.__getitem__, room, costs)

    def _traffic(self, layer: int, experts: int, costs: Costs) -> list[Traffic]:
        """As foreseen, else as it was. No target is known to be met before an exchange was measured."""
        now = time.monotonic()
        targets = [seconds / costs.expert_s if costs.expert_s else 0.0 for seconds in self._targets_s]
        phases = [self._foresight.seen(layer, experts, now, prefill) for prefill in (False, True)]
        if any(phases):
            return [Traffic(*seen, target) for seen, target in zip(phases, targets, strict=True) if seen]
        seen = self._window.seen(layer, experts, now)
        return [Traffic(samples_of(seen.active[-LATEST:]), seen.rate, targets[0])] if seen else []

    def _foreseen(self, message: Foreseen) -> None:
        try:
            self._foresight.add(message, time.monotonic())
        except BadMessage as error:
            self._instance.bus.counts["malformed"] += 1
            log.debug("%s", error)
