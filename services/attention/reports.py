"""What an attention instance tells of its routing over NATS: activations always, the ids themselves to recorders.

Runs in the asyncio thread; what is told comes from the compute thread through tap.py.
"""

import asyncio
import time

from services.attention.activations import Activations
from services.attention.recording import MOST_AT_ONCE, MOST_WAITING
from services.attention.tap import RoutingTap
from shared.lifecycle import Instance
from shared.load_messages import Activated
from shared.traces.wire import RoutingTrace, TraceLease, leases, routing

REPORT_S = 3.0
"""Between two reports of activations; what nobody has asked an expert for is not reported."""
SEND_S = 0.1
"""Between two rounds of sending to recorders."""
MOST_MESSAGES = 2 * MOST_WAITING // MOST_AT_ONCE
"""Of one round: enough for all that may wait. Exchanges go on meanwhile, and leases must end."""


class RoutingReports:
    """Make it, then ``start`` it; it ends with the instance."""

    def __init__(self, instance: Instance, tap: RoutingTap, every: float = REPORT_S) -> None:
        self._instance, self._tap, self._every = instance, tap, every
        self._wanted = asyncio.Event()

    async def start(self) -> None:
        instance = self._instance
        await instance.bus.subscribe(leases(instance.subjects), TraceLease, self._lease)
        instance.spawn(self._keep_reporting(), "activations")
        instance.spawn(self._keep_sending(), "routing")

    # ---- activations ------------------------------------------------------------------------------------

    async def _keep_reporting(self) -> None:
        while True:
            await asyncio.sleep(self._every)
            for layer in self._tap.ring.layers:
                latest = self._tap.ring.take(layer)
                if latest:
                    await self._report(layer, latest)

    async def _report(self, layer: int, latest: Activations) -> None:
        instance = self._instance
        message = Activated(
            attention=instance.id,
            incarnation=instance.incarnation,
            layer=layer,
            experts=self._tap.experts,
            seconds=max(0.0, time.monotonic() - latest.since),
            rows=latest.rows,
            masks=latest.masks.astype("<u8").tobytes(),
        )
        await instance.bus.publish(instance.subjects.activated, message)

    # ---- recorders --------------------------------------------------------------------------------------

    async def _lease(self, lease: TraceLease) -> None:
        """A new recorder learns at once that this instance records, and from which exchange on."""
        new = self._tap.recording.lease(lease.recorder, lease.seconds)
        self._wanted.set()
        if new:
            await self._send(b"", self._tap.recording.passed, started=lease.recorder)

    async def _keep_sending(self) -> None:
        recording = self._tap.recording
        while True:
            await self._wanted.wait()
            await asyncio.sleep(SEND_S)
            ended = recording.expire()
            for _ in range(MOST_MESSAGES):
                records, seen = recording.take()
                if not records:
                    break
                await self._send(records, seen)
            if ended:
                await self._send(b"", recording.passed, ended=ended)
            if not recording.recorders:
                self._wanted.clear()

    async def _send(self, records: bytes, seen: int, started: str = "", ended: tuple[str, ...] = ()) -> None:
        instance = self._instance
        message = RoutingTrace(
            attention=instance.id,
            incarnation=instance.incarnation,
            records=records,
            seen=seen,
            started=started,
            ended=ended,
        )
        await instance.bus.publish(routing(instance.subjects), message)
