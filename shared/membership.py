"""Who is in the mesh: a live view of all instances, made from heartbeats.

Covers joining, leaving, silence and restarts. The core takes heartbeats and a clock and does no I/O; ``watch`` feeds it
from the bus. What follows from a change (routing, placement) is decided by those who ask.
"""

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass

from shared.bus import Bus
from shared.messages import Heartbeat, Hello, Kind, State, Subjects

HEARTBEAT_S = 1.0
SUSPECT_AFTER_S = 3.0
GONE_AFTER_S = 10.0
SUSPEND_S = 5.0
"""A watcher that was cut off itself judges nobody for so long after it hears again."""
JUDGE_EVERY_S = 0.5


@dataclass
class Member:
    """One instance as its last heartbeat described it."""

    heartbeat: Heartbeat
    last_seen: float
    """Clock of the watcher."""
    suspect: bool = False
    """Silent for SUSPECT_AFTER_S; still in ``all`` and ``ready``, because silence alone proves nothing."""

    @property
    def id(self) -> str:
        return self.heartbeat.id

    @property
    def ready(self) -> bool:
        return self.heartbeat.state is State.READY


class Members:
    """The view of one watcher. A member leaves it when it says GONE or is silent for GONE_AFTER_S.

    ``own_id``: this process's instance, whose heartbeats come back over NATS; when they do not, it is this watcher that
    is cut off (or its loop was blocked), and nobody is judged.
    """

    def __init__(self, mesh: str, own_id: str = "", clock: Callable[[], float] = time.monotonic) -> None:
        self.subjects = Subjects(mesh)
        self._own_id = own_id
        self._clock = clock
        self._members: dict[str, Member] = {}
        self._past: dict[str, set[int]] = {}
        """id -> incarnations that said GONE or were replaced; what they still send is late."""
        self._callbacks: list[Callable[[], None]] = []
        self._connected = True
        self._greeted = False
        self._hearing_since = clock()

    def all(self) -> list[Member]:
        """Everybody that is not gone, sorted by id."""
        return [self._members[i] for i in sorted(self._members)]

    def ready(self, kind: Kind) -> list[Member]:
        """READY members of one kind, sorted by id; suspects included."""
        return [m for m in self.all() if m.heartbeat.kind is kind and m.ready]

    def get(self, id: str) -> Member | None:
        return self._members.get(id)

    def on_change(self, callback: Callable[[], None]) -> None:
        """Called when somebody joins, leaves, becomes suspect or says something new (other than attention's load)."""
        self._callbacks.append(callback)

    async def watch(self, bus: Bus) -> None:
        """Feed this view from ``bus`` until that is closed; everybody is asked to say who they are."""
        await bus.subscribe(self.subjects.heartbeats, Heartbeat, self.beat, ordered=True)
        bus.on_connection(self.connection)
        self.connection(bus.connected)
        self._watching = asyncio.create_task(self._keep_judging(bus))

    async def _keep_judging(self, bus: Bus) -> None:
        while not bus.closed:
            if self._connected and not self._greeted:
                self._greeted = True
                await bus.publish(self.subjects.hello, Hello(id=self._own_id))
            self.judge()
            await asyncio.sleep(JUDGE_EVERY_S)

    # ---- the core -----------------------------------------------------------------------------------------

    def beat(self, heartbeat: Heartbeat) -> None:
        """Take in one heartbeat. One from a replaced incarnation, or from one that said GONE, is ignored."""
        past = self._past.setdefault(heartbeat.id, set())
        if heartbeat.incarnation in past:
            return
        before = self._members.get(heartbeat.id)
        newcomer = before is None or before.heartbeat.incarnation != heartbeat.incarnation
        if heartbeat.state is State.GONE:
            self._leave(heartbeat, current=not newcomer)
            return
        if before is not None and newcomer:
            past.add(before.heartbeat.incarnation)
        self._members[heartbeat.id] = Member(heartbeat, self._clock())
        if before is None or before.suspect or _said(before.heartbeat) != _said(heartbeat):
            self._changed()

    def _leave(self, heartbeat: Heartbeat, current: bool) -> None:
        """An incarnation said GONE. One that it had replaced may come back: a second start with its id was refused."""
        past = self._past[heartbeat.id]
        if current:
            del self._members[heartbeat.id]
            past.clear()
        past.add(heartbeat.incarnation)
        if current:
            self._changed()

    def connection(self, connected: bool) -> None:
        """NATS was lost by, or came back to, this watcher."""
        self._connected = connected
        self._greeted = False
        self._hearing_since = self._clock()

    def judge(self) -> None:
        """Mark silent members suspect and drop those that are silent for too long; call it a few times a second."""
        now = self._clock()
        if self._deaf(now):
            self._hearing_since = now
        if now - self._hearing_since < SUSPEND_S:
            return
        changed = False
        for member in self.all():
            silence = now - max(member.last_seen, self._hearing_since)
            if silence > GONE_AFTER_S:
                del self._members[member.id]
                changed = True
            elif silence > SUSPECT_AFTER_S and not member.suspect:
                member.suspect = changed = True
        if changed:
            self._changed()

    def _deaf(self, now: float) -> bool:
        own = self._members.get(self._own_id)
        echo_missing = own is not None and now - max(own.last_seen, self._hearing_since) > 2 * HEARTBEAT_S
        return not self._connected or echo_missing

    def _changed(self) -> None:
        for callback in self._callbacks:
            callback()


def _said(heartbeat: Heartbeat) -> tuple[object, ...]:
    """What a change of is news: everything but the load figures, which change with every step."""
    placement = heartbeat.attention.placement if heartbeat.attention else 0
    return (
        heartbeat.incarnation, heartbeat.state, heartbeat.url, heartbeat.detail, heartbeat.model, heartbeat.experts,
        heartbeat.placement, heartbeat.serial, placement, heartbeat.pools,
    )  # fmt: skip
