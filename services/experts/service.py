"""The NATS side of an expert instance: follows the placement, forgets attention that is gone, tells what it holds.

Runs in the asyncio thread; exchanges never pass through here.
"""

import asyncio
import logging
from collections.abc import Iterable, Iterator

from services.experts.answers import KnownPlacement
from services.experts.build import Built
from services.experts.elastic import Elastic
from services.experts.relay import Neighbour
from services.experts.store import Homes, StoreRefusal
from shared.changes import Phase
from shared.lifecycle import Instance
from shared.load_messages import Foreseen
from shared.messages import ExpertCosts, ExpertFacts, Placement
from shared.metrics import Sample, expert_samples, sample
from shared.placement_watch import PlacementWatch

DRAIN_POLL_S = 0.05
QUIET_S = 2.0
"""Without a frame for so long, nobody counts on a draining instance any more."""
REPORT_S = 1.0
"""Between two reports of foreseen loads; no exchange, no report."""

log = logging.getLogger(__name__)


class ExpertsService:
    """Make it, then ``start`` it."""

    def __init__(self, instance: Instance, built: Built, moe_layers: tuple[int, ...]) -> None:
        self._instance = instance
        self._server, self._store, self._transport = built.server, built.store, built.transport
        self._pace, self._cores, self._elastic = built.pace, built.cores, built.elastic
        self._moe_layers = moe_layers
        self._kept: tuple[Placement, ...] = ()
        """What is answered, oldest first: at most two versions."""
        self._refused = 0
        """The version that was refused last."""
        self._seen: set[int] = set()
        self._neighbours: dict[str, Neighbour] = {}
        self._changed = asyncio.Event()

    def facts(self) -> ExpertFacts:
        """The heartbeat's part about this instance."""
        return ExpertFacts(
            address=self._transport.address,
            placement=self._version,
            replicas=self._replicas,
            cores=self._cores,
            slots=self._store.slots,
            refused=self._refused,
            elastic=self._elastic.facts() if self._elastic else None,
        )

    def costs(self) -> ExpertCosts:
        """The heartbeat's part about what replicas cost."""
        store, stats = self._store, self._server.stats
        activations = int(stats.by_expert[:, 1].sum())
        return ExpertCosts(
            replica_bytes=store.nbytes // max(1, store.replicas),
            load_rate=store.load_rate,
            expert_s=stats.busy_s / activations if activations else 0.0,
        )

    async def start(self, watch: PlacementWatch) -> None:
        """Take the placement that is there, then follow it in the background. Raises ModelError."""
        self._watch = watch
        watch.on_change(self._changed.set)
        self._instance.members.on_change(self._detach_gone)
        self._instance.members.on_change(self._meet_neighbours)
        await self._take_newest()
        self._instance.spawn(self._follow(), "placement")
        if self._elastic:
            self._instance.spawn(self._keep_reporting(self._elastic), "foreseen loads")

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
        yield sample("answers", stats.answers)
        yield sample("answers_express", stats.express)
        yield from self._pace.samples()
        yield from self._elastic.samples() if self._elastic else ()
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
        """Answer what is stored: the committed placement, and the one before it or the one that may follow."""
        self._changed.clear()
        record = self._watch.record
        if record is None:
            return
        wanted = [placement for placement in record.versions if await self._can_take(placement)]
        if [p.version for p in wanted] == [p.version for p in self._kept]:
            return
        await self._adopt(wanted)
        if record.phase is not Phase.PREPARE or self._refused != record.newest:
            await self._instance.say("")

    async def _can_take(self, placement: Placement) -> bool:
        try:
            self._store.check(placement)
        except StoreRefusal as refusal:
            if self._refused != placement.version:
                self._refused = placement.version
                log.error("%s", refusal)
                await self._instance.say(str(refusal))
            return False
        return True

    async def _adopt(self, placements: list[Placement]) -> None:
        """Load new homes beside the old ones while those are answered. Where slots are short, old ones make room."""
        store, versions = self._store, {p.version for p in placements}
        old = [placement for placement in self._kept if placement.version in versions]
        plan = store.plan(placements)
        await self._answer(old)
        await asyncio.to_thread(store.keep_only, placements)
        await asyncio.to_thread(store.load_beside, plan)
        await self._answer(old, plan)  # other layers of it are refused from here on: attention repeats them
        await asyncio.to_thread(store.become, plan)
        await self._answer(placements, plan)
        self._kept = tuple(placements)
        log.info("placement %d: %d replicas", self._version, self._replicas)

    async def _answer(self, placements: Iterable[Placement], plan: Homes | None = None) -> None:
        """Answer these, as far as their homes are resident, and stay so by ``plan``."""
        layers = self._store.layers_of
        known = [KnownPlacement.of(p, self._instance.id, layers(p, plan)) for p in placements]
        await asyncio.wrap_future(self._server.adopt(known))

    # ---- foreseen loads ---------------------------------------------------------------------------------

    async def _keep_reporting(self, elastic: Elastic) -> None:
        instance = self._instance
        while True:
            await asyncio.sleep(REPORT_S)
            for load in elastic.foreseen.take():
                message = Foreseen(
                    instance=instance.id,
                    incarnation=instance.incarnation,
                    layer=self._moe_layers[load.layer],
                    experts=load.sums.shape[1],
                    exchanges=load.exchanges,
                    sums=load.sums.astype("<f4").tobytes(),
                    prefill_exchanges=load.prefill_exchanges,
                    prefill_sums=load.prefill_sums.astype("<f4").tobytes() if load.prefill_exchanges else b"",
                )
                await instance.bus.publish(instance.subjects.foreseen, message)

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
