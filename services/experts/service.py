"""The NATS side of an expert instance: follows the placement, forgets attention that is gone, tells what it holds.

Runs in the asyncio thread; exchanges never pass through here.
"""

import asyncio
import logging
from collections.abc import Iterator

from services.experts.answers import KnownPlacement
from services.experts.build import Built
from services.experts.relay import Neighbour
from services.experts.store import StoreRefusal
from shared.lifecycle import Instance
from shared.messages import ExpertFacts, Placement
from shared.metrics import Sample, expert_samples, sample
from shared.placement_watch import PlacementWatch

DRAIN_POLL_S = 0.05
QUIET_S = 2.0
"""Without a frame for so long, nobody counts on a draining instance any more."""

log = logging.getLogger(__name__)


class ExpertsService:
    """Make it, then ``start`` it."""

    def __init__(self, instance: Instance, built: Built, moe_layers: tuple[int, ...]) -> None:
        self._instance = instance
        self._server, self._store, self._transport = built.server, built.store, built.transport
        self._pace, self._cores = built.pace, built.cores
        self._moe_layers = moe_layers
        self._kept: list[Placement] = []
        """What is answered, oldest first: at most two versions."""
        self._refused = 0
        self._seen: set[int] = set()
        self._neighbours: dict[str, Neighbour] = {}
        self._changed = asyncio.Event()

    def facts(self) -> ExpertFacts:
        """The heartbeat's part about this instance."""
        return ExpertFacts(
            address=self._transport.address, placement=self._version, replicas=self._replicas, cores=self._cores
        )

    async def start(self, watch: PlacementWatch) -> None:
        """Take the placement that is there, then follow it in the background. Raises ModelError."""
        self._watch = watch
        watch.on_change(self._changed.set)
        self._instance.members.on_change(self._detach_gone)
        self._instance.members.on_change(self._meet_neighbours)
        await self._take_newest()
        self._instance.spawn(self._follow(), "placement")

    async def drain(self, seconds: float) -> None:
        """Go on answering until no attention instance can count on this one, or ``seconds`` have passed."""
        loop = asyncio.get_running_loop()
        give_up = loop.time() + seconds
        while loop.time() < give_up:
            if self._dispensable():
                return
            await asyncio.sleep(DRAIN_POLL_S)

    def samples(self) -> Iterator[Sample]:
        """For /metrics; read in another thread."""
        stats = self._server.stats
        yield sample("replicas", self._replicas)
        yield sample("expert_bytes", self._store.nbytes)
        yield sample("placement_version", self._version)
        yield sample("exchange_bytes", stats.bytes_sent, direction="sent")
        yield sample("exchange_bytes", stats.bytes_received, direction="received")
        yield sample("compute_seconds", stats.busy_s)
        yield from self._pace.samples()
        refused = {f"refused_{code}": count for code, count in stats.refused.copy().items()}
        for reason, count in (refused | stats.dropped.copy() | self._transport.dropped.copy()).items():
            yield sample("frames_dropped", count, reason=reason)
        yield from expert_samples("expert_tokens", stats.by_expert[:, 0], self._moe_layers)
        yield from expert_samples("expert_activations", stats.by_expert[:, 1], self._moe_layers)

    # ---- the placement ----------------------------------------------------------------------------------

    @property
    def _version(self) -> int:
        return self._kept[-1].version if self._kept else 0

    @property
    def _replicas(self) -> int:
        return self._store.replicas

    async def _follow(self) -> None:
        while True:
            await self._changed.wait()
            await self._take_newest()

    async def _take_newest(self) -> None:
        self._changed.clear()
        newest = self._watch.current
        if newest is None or newest.version in (self._version, self._refused):
            return
        try:
            self._store.check(newest)
        except StoreRefusal as refusal:
            self._refused = newest.version
            log.error("%s", refusal)
            await self._instance.say(str(refusal))
            return
        await self._adopt(newest)
        await self._instance.say("")

    async def _adopt(self, placement: Placement) -> None:
        """Load the new homes beside the old ones, answer both versions, then let go of what is older."""
        before = self._kept[-1:] if self._store.fits([*self._kept[-1:], placement]) else []
        if self._kept and not before:
            await self._answer_only([])  # both do not fit: attention repeats until the new ones are loaded
            await asyncio.to_thread(self._store.keep_only, [placement])
        await asyncio.to_thread(self._store.load, placement)
        await self._answer_only([*before, placement])
        await asyncio.to_thread(self._store.keep_only, self._kept)
        log.info("placement %d: %d replicas", placement.version, self._replicas)

    async def _answer_only(self, placements: list[Placement]) -> None:
        known = [KnownPlacement.of(placement, self._instance.id) for placement in placements]
        await asyncio.wrap_future(self._server.adopt(known))
        self._kept = placements

    # ---- attention instances ----------------------------------------------------------------------------

    def _meet_neighbours(self) -> None:
        """The other expert instances of this node, to whom exchanges may be passed on."""
        members, instance = self._instance.members.all(), self._instance
        near = ((m.id, m.heartbeat) for m in members if m.heartbeat.node == instance.node and m.id != instance.id)
        found = {name: Neighbour(beat.incarnation, beat.experts.address) for name, beat in near if beat.experts}
        if found != self._neighbours:
            self._neighbours = found
            self._server.meet(found)

    def _detach_gone(self) -> None:
        members = self._instance.members.all()
        now = {m.heartbeat.incarnation for m in members}
        if gone := self._seen - now:
            self._server.detach(gone)
        self._seen = now

    def _dispensable(self) -> bool:
        """Nobody asks any more, or everybody has a placement without us."""
        attention = [m.heartbeat.attention for m in self._instance.members.all() if m.heartbeat.attention]
        if not attention or self._server.idle_for() > QUIET_S:
            return True
        newest = self._watch.current
        if newest is None or self._instance.id in newest.instances:
            return False
        return all(facts.placement >= newest.version for facts in attention)
