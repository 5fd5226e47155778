"""What is stored about the placement, as everyone but its author sees it.

Reads the key-value store at the start, whenever a scheduler announces another record, and after NATS was away. It asks
again instead of watching the key: a watcher's consumer dies with the server. What follows from it is up to the reader.
"""

import asyncio
import logging
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Self

import numpy as np

from shared.changes import Phase, PlacementRecord
from shared.errors import BadMessage, BusUnavailable
from shared.membership import Member
from shared.messages import AttentionFacts, Kind, Placement, Subjects
from shared.store import Store

if TYPE_CHECKING:
    from shared.lifecycle import Instance

RETRY_S = 0.5

log = logging.getLogger(__name__)


def homes_array(placement: Placement) -> np.ndarray:
    """uint64 [MoE layers, experts]: mask of home instances per expert. Raises BadMessage when the size is wrong."""
    masks = np.frombuffer(placement.homes, dtype="<u8") if len(placement.homes) % 8 == 0 else np.zeros(0, "<u8")
    shape = (len(placement.moe_layers), placement.experts)
    if masks.size != shape[0] * shape[1]:
        raise BadMessage(
            "Placement", f"{len(placement.homes)} bytes of homes for {shape[0]} layers of {shape[1]} experts"
        )
    return masks.reshape(shape)


async def read_record(store: Store) -> tuple[PlacementRecord | None, int]:
    """The stored record and its revision, 0 when there is none. Raises BusUnavailable.

    One that cannot be read is None too: the leading scheduler replaces it.
    """
    found = await store.get(Subjects.PLACEMENT_KEY)
    if found is None:
        return None, 0
    try:
        record = PlacementRecord.decode(found[0])
        for placement in record.versions:
            homes_array(placement)
    except BadMessage as error:
        log.warning("key %s of bucket %s holds no placement: %s", Subjects.PLACEMENT_KEY, store.bucket, error)
        return None, found[1]
    return record, found[1]


def waits_for(record: PlacementRecord, members: Iterable[Member]) -> list[str]:
    """Ids of the instances that a change under way waits for."""
    if record.phase is Phase.PREPARE and record.other:
        return unloaded(record.other, members)
    return behind(record.committed, members) if record.phase is Phase.COMMIT and record.committed else []


def unloaded(placement: Placement, members: Iterable[Member]) -> list[str]:
    """Ids of the expert instances that have not loaded all of their homes."""
    facts = {m.id: m.heartbeat.experts for m in members}
    return [i for i in placement.instances if not (f := facts.get(i)) or f.placement < placement.version]


def behind(placement: Placement, members: Iterable[Member]) -> list[str]:
    """Ids of the attention instances that still use an older version. Who has none yet will begin with this one."""
    attention = [(m.id, m.heartbeat.attention) for m in members if m.heartbeat.attention]
    return [id for id, facts in attention if facts and _uses_older(facts, placement)]


def _uses_older(facts: AttentionFacts, placement: Placement) -> bool:
    return not facts.monolith and 0 < facts.placement < placement.version


class PlacementWatch:
    """``record`` is the newest that is known here, or None."""

    def __init__(self, instance: "Instance") -> None:
        self.record: PlacementRecord | None = None
        self._instance = instance
        self._callbacks: list[Callable[[], None]] = []
        self._due = asyncio.Event()
        self._due.set()

    @property
    def current(self) -> Placement | None:
        """The committed placement."""
        return self.record.committed if self.record else None

    async def start(self) -> Self:
        """Read once, then keep reading in the background. Raises BusUnavailable."""
        instance = self._instance
        self._store = await instance.bus.store(instance.subjects.bucket)
        await self._read()
        instance.members.on_change(self._listen)
        instance.bus.on_connection(lambda connected: self._due.set())
        instance.spawn(self._keep_reading(), "placement-watch")
        return self

    def on_change(self, callback: Callable[[], None]) -> None:
        """Called in the asyncio thread after ``record`` changed."""
        self._callbacks.append(callback)

    def _listen(self) -> None:
        """Ask the store when a scheduler has announced a record that is not ours."""
        serial = self.record.serial if self.record else 0
        announced = {m.heartbeat.serial for m in self._instance.members.ready(Kind.SCHEDULER)}
        if announced - {serial, 0}:
            self._due.set()

    async def _keep_reading(self) -> None:
        while True:
            await self._due.wait()
            self._due.clear()
            try:
                await self._read()
            except BusUnavailable as error:
                log.warning("placement not read, trying again: %s", error)
                self._due.set()
                await asyncio.sleep(RETRY_S)

    async def _read(self) -> None:
        found, _ = await read_record(self._store)
        if found and (self.record is None or _order(found) > _order(self.record)):
            self.record = found
            for callback in self._callbacks:
                callback()


def _order(record: PlacementRecord) -> tuple[int, int]:
    """Of two records the later one is greater. A lost store begins its serial anew, never the versions."""
    return record.newest, record.serial
