"""The loop that sizes the pools by demand: hears what gateways serve, plans, and says to the pool loop what to desire.

Decides by pure functions (traffic.py, autoscaling.py). Every scheduler follows what is served, so that a successor
knows it; only the one that leads changes anything, one change at a time.
"""

import asyncio
import logging
import time
from collections import Counter
from collections.abc import Iterator
from typing import Any

from services.scheduler.autoscale_settings import Profile
from services.scheduler.autoscaling import (
    A,
    E,
    Look,
    Need,
    Offs,
    Rules,
    Sizes,
    corrected,
    needed,
    pressed,
    remembered,
    seats,
    target,
)
from services.scheduler.placement import room
from services.scheduler.planner import CannotHold, Planner
from services.scheduler.pool_loop import PoolLoop
from services.scheduler.pools import by_hand, present, unfinished
from services.scheduler.reconciler import Reconciler
from services.scheduler.traffic import Traffic
from shared.errors import Refused
from shared.lifecycle import Instance
from shared.load_messages import Served
from shared.messages import AutoscaleFacts, Kind, Pool
from shared.metrics import Sample, sample
from shared.planning.deciding import WINDOWS, moving_quantile

LOOK_S = 1.0
SETTLE_S = 2.0
"""Times of a mesh that has just changed say nothing about what comes."""

log = logging.getLogger(__name__)


class Autoscaler:
    """Make it, then ``start``. Belongs to the asyncio thread.

    Args:
        acts: False: only says what it would do.
    """

    _running: asyncio.Task[None]

    def __init__(
        self, instance: Instance, rules: Rules, profile: Profile, acts: bool, pools: PoolLoop, reconciler: Reconciler
    ) -> None:
        self._instance, self._profile, self._rules = instance, profile, rules
        self._pools, self._reconciler = pools, reconciler
        self._acts = acts
        self._facts = AutoscaleFacts(mode="on" if self._acts else "observe")
        now = time.monotonic()
        self._traffic = Traffic(WINDOWS * rules.window_s, now)
        self._planner: Planner | None = None
        self._needs: list[Need] = []
        self._offs: Offs = {}
        self._steady_since = now
        self._changes: Counter[Pool] = Counter()
        self._stopping = False

    async def start(self) -> None:
        """Listen to gateways, and keep looking in the background. Raises BusUnavailable."""
        instance = self._instance
        if self._acts:
            self._pools.notes = (f"autoscaling goes on after {self._rules.cooldown_s:g} s",)
        instance.telemetry.collect(self.samples)
        await instance.bus.subscribe(instance.subjects.served, Served, self._served, ordered=True)
        self._running = instance.spawn(self._run(), "autoscaler")

    async def stop(self) -> None:
        """End the loop."""
        self._stopping = True  # nats-py may drop the cancellation
        self._running.cancel()
        await asyncio.wait([self._running])

    def facts(self) -> dict[str, Any]:
        """Heartbeat fields."""
        return {"autoscale": self._facts} if self._reconciler.leads else {}

    def samples(self) -> Iterator[Sample]:
        """For /metrics; read in another thread."""
        facts = self._facts
        yield sample("autoscale_rate", facts.rate)
        yield sample("autoscale_expected_rate", facts.expected)
        yield sample("autoscale_tpot_seconds", facts.tpot_s)
        yield sample("autoscale_planned_tpot_seconds", facts.planned_tpot_s)
        yield sample("autoscale_measured_over_predicted", facts.measured_over_predicted)
        for pool, count in facts.sizes.items():
            yield sample("autoscale_instances", count, pool=pool.value, mode=facts.mode)
        for pool, count in self._changes.copy().items():
            yield sample("autoscale_changes", count, pool=pool.value)

    def _served(self, message: Served) -> None:
        self._traffic.add(message, time.monotonic())

    # ---- the loop ---------------------------------------------------------------------------------------

    async def _run(self) -> None:
        while not self._stopping:
            await asyncio.sleep(LOOK_S)
            if not self._instance.bus.connected:
                self._forget()
                continue
            try:
                await self._look()
            except (CannotHold, Refused) as error:
                self._needs.clear()  # nobody knows what would have been needed meanwhile
                self._say(doing=str(error))

    def _forget(self) -> None:
        """What is not heard is not known: silence does not mean that nobody asks."""
        self._traffic = Traffic(WINDOWS * self._rules.window_s, time.monotonic())
        self._needs.clear()

    async def _planned_with(self) -> Planner:
        """The planner for the slots that expert instances have; its tables are made in the background.

        Raises CannotHold.
        """
        slots = self._slots()
        if self._planner is None or self._planner.slots != slots:
            self._planner = await asyncio.to_thread(Planner, self._profile, slots, self._rules)
        return self._planner

    def _slots(self) -> int:
        ready = self._instance.members.ready(Kind.EXPERTS)
        model = next((m.heartbeat.model for m in ready if m.heartbeat.model), None)
        if model is None:
            return self._planner.slots if self._planner else self._profile.fitted.sizes.experts
        return room(ready, model)

    async def _look(self) -> None:
        """See, plan, and change what should be changed, if we lead. Raises CannotHold, Refused."""
        look, rules, hold, missing = self._seen(time.monotonic()), self._rules, self._hold(), self._missing()
        self._tell(look)
        planner = await self._planned_with()
        if hold or missing:
            self._steady_since = look.now + SETTLE_S
        else:
            self._offs = corrected(self._offs, look, planner)
        need = needed(look, rules, planner, self._offs)
        grows = any(need.sizes[pool] > look.sizes[pool] for pool in Pool)
        more = None if hold or missing or grows else pressed(look, rules, planner)
        need = more or need
        self._needs = remembered(self._needs, need, rules.cooldown_s)
        wanted = target(self._needs, look.sizes, rules.cooldown_s)
        self._say(need=need, doing=hold or _in_words(wanted, look.sizes, self._acts))
        if wanted and not hold and self._acts:
            await self._pools.want(wanted, f"autoscaling: {need.why}")
            self._changes.update(wanted.keys())
            log.info("%s: %s", _in_words(wanted, look.sizes, True), need.why)

    def _seen(self, now: float) -> Look:
        window_s = self._rules.window_s
        members = self._instance.members
        desired = self._pools.desired.counts if self._pools.desired else {}
        lately = self._traffic.seen(WINDOWS * window_s, now)
        rates = self._traffic.rates(window_s, WINDOWS, now)
        facts = [m.heartbeat.attention for m in members.ready(Kind.ATTENTION) if m.heartbeat.attention]
        return Look(
            now=now,
            sizes=present(members.all()) | desired,
            rate=moving_quantile(rates) if len(rates) else lately.rate,
            lately=lately,
            steady=self._traffic.seen(max(0.0, min(window_s, now - self._steady_since)), now),
            idle_s=self._traffic.idle_s(now),
            seats=seats(facts, lately.prompt + lately.output),
        )

    def _hold(self) -> str:
        """Why nothing may be changed now; empty: it may."""
        members = self._instance.members.all()
        if not self._reconciler.leads:
            return "another scheduler leads"
        if any(m.heartbeat.model and m.heartbeat.model.digest != self._profile.digest for m in members):
            return "the profile is of another model than the mesh serves: give the scheduler its --model and --profile"
        if self._reconciler.state in ("changing", "settling", "cut off"):
            return f"the placement is {self._reconciler.state}"
        if self._pools.desired is None:
            return "what sizes are desired is not known yet"
        wishes, now, there = self._pools.desired.wishes, time.time(), present(members)
        if waited := [pool for pool in Pool if not there[pool] and pool not in wishes]:
            return f"{', '.join(waited)}: waits for the first instance"
        return unfinished(wishes, members, now) or by_hand(wishes, self._rules.cooldown_s, now)

    def _missing(self) -> bool:
        """Whether there are fewer instances than are desired, so that times say nothing of these sizes."""
        desired, there = self._pools.desired, present(self._instance.members.all())
        return bool(desired) and any(there[pool] < count for pool, count in desired.counts.items())

    # ---- what is shown ----------------------------------------------------------------------------------

    def _tell(self, look: Look) -> None:
        last = self._traffic.seen(self._rules.window_s, look.now)
        seen = {
            "rate": last.rate, "expected": look.rate, "prompt": look.lately.prompt, "output": look.lately.output,
            "open": last.open, "tpot_s": last.inter.mean, "ttft_s": last.first.mean,
            "measured_over_predicted": self._offs.get((look.sizes[A], look.sizes[E]), 1.0),
        }  # fmt: skip
        self._facts = self._facts.model_copy(update=seen)

    def _say(self, doing: str, need: Need | None = None) -> None:
        sizes, why, tpot_s = (dict(need.sizes), need.why, need.tpot_s) if need else ({}, "", 0.0)
        said = {"doing": doing, "sizes": sizes, "why": why, "planned_tpot_s": tpot_s}
        if doing != self._facts.doing and not self._acts and need:
            log.info("%s (%s)", doing, need.why)
        self._facts = self._facts.model_copy(update=said)


def _in_words(wanted: Sizes, sizes: Sizes, acts: bool) -> str:
    """A change for a person."""
    if not wanted:
        return "no change: sizes are right, fewer were not enough for long enough, or no more are measured or allowed"
    what = ", ".join(f"{pool} {sizes[pool]} -> {count}" for pool, count in wanted.items())
    return what if acts else f"would change {what}"
