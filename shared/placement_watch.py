"""The current placement, as everyone but its author sees it.

Reads the key-value store at the start, whenever a scheduler announces another version, and after NATS was away. It asks
again instead of watching the key: a watcher's consumer dies with the server. Adopting a version is up to the reader.
"""

import asyncio
import logging
from collections.abc import Callable
from typing import TYPE_CHECKING, Self

import numpy as np

from shared.errors import BadMessage, BusUnavailable
from shared.membership import Member, Members
from shared.messages import Kind, Placement, State, Subjects
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


async def read_placement(store: Store) -> tuple[Placement | None, int]:
    """The stored placement and its revision, 0 when there is none. Raises BusUnavailable.

    One that cannot be read is None too: the leading scheduler replaces it.
    """
    found = await store.get(Subjects.PLACEMENT_KEY)
    if found is None:
        return None, 0
    try:
        placement = Placement.decode(found[0])
        homes_array(placement)
    except BadMessage as error:
        log.warning("key %s of bucket %s holds no placement: %s", Subjects.PLACEMENT_KEY, store.bucket, error)
        return None, found[1]
    return placement, found[1]


def has_loaded(placement: Placement, member: Member | None) -> bool:
    """Whether ``member`` need not be waited for: it has loaded its homes, or it is suspect, leaving or gone."""
    if member is None or member.suspect or member.heartbeat.state is not State.READY:
        return True
    experts = member.heartbeat.experts
    return experts is not None and experts.placement >= placement.version


def adoptable(placement: Placement, members: Members) -> bool:
    """Whether attention may switch to ``placement``: nobody who is alive is still loading homes for it."""
    return all(has_loaded(placement, members.get(instance)) for instance in placement.instances)


class PlacementWatch:
    """``current`` is the newest version known here, or None."""

    def __init__(self, instance: "Instance") -> None:
        self.current: Placement | None = None
        self._instance = instance
        self._callbacks: list[Callable[[], None]] = []
        self._due = asyncio.Event()
        self._due.set()

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
        """Called in the asyncio thread after ``current`` changed."""
        self._callbacks.append(callback)

    def _listen(self) -> None:
        """Ask the store when a scheduler has announced a version that is not ours."""
        version = self.current.version if self.current else 0
        announced = {m.heartbeat.placement for m in self._instance.members.ready(Kind.SCHEDULER)}
        if announced - {version, 0}:
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
        found, _ = await read_placement(self._store)
        if found and (self.current is None or found.version > self.current.version):
            self.current = found
            for callback in self._callbacks:
                callback()
