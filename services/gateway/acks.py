"""Acknowledgements and cancellations to attention instances: what lets them forget.

Acknowledgements are cumulative and go out in batches. NATS may lose one, so the end of a request is said several times.
"""

import asyncio
from collections import defaultdict

from shared.bus import Bus
from shared.errors import BusUnavailable
from shared.messages import Subjects
from shared.request_messages import Ack, Cancel, Decision

ACK_EVERY_S = 0.25
DONE_REPEATS = 3
CANCEL_TIMEOUT_S = 1.0
CANCEL_LIMIT_S = 60.0
"""A cancellation nobody answered for so long is dropped; the request's own deadline ends it then."""


class Acks:
    """Collects per instance what was received and what is over."""

    def __init__(self, bus: Bus, subjects: Subjects, gateway: str) -> None:
        self._bus = bus
        self._subjects = subjects
        self._gateway = gateway
        self._received: defaultdict[str, dict[str, int]] = defaultdict(dict)
        self._done: defaultdict[str, dict[str, int]] = defaultdict(dict)
        self._cancels: dict[tuple[str, str], asyncio.Task[None]] = {}

    def received(self, instance: str, request: str, position: int) -> None:
        """Everything below ``position`` has arrived."""
        self._received[instance][request] = position

    def done(self, instance: str, request: str) -> None:
        """The request is over and may be forgotten."""
        self._received[instance].pop(request, None)
        self._done[instance].setdefault(request, DONE_REPEATS)

    def cancel(self, instance: str, request: str) -> None:
        """Tell the instance to stop, again and again until it answers. Repeated calls change nothing."""
        key = instance, request
        if key in self._cancels:
            return
        self._received[instance].pop(request, None)
        task = asyncio.create_task(self._cancel(instance, request))
        self._cancels[key] = task
        task.add_done_callback(lambda _: self._cancels.pop(key, None))

    def forget(self, instance: str) -> None:
        """The instance is gone."""
        self._received.pop(instance, None)
        self._done.pop(instance, None)
        for (target, _), task in list(self._cancels.items()):
            if target == instance:
                task.cancel()

    async def run(self) -> None:
        """Send batches until cancelled."""
        while True:
            await asyncio.sleep(ACK_EVERY_S)
            await self.flush()

    async def flush(self) -> None:
        """Send what has collected; kept for later while NATS is away."""
        if not self._bus.connected:
            return
        for instance in {*self._received, *self._done}:
            received = self._received.pop(instance, {})
            done = self._done.pop(instance, {})
            left = {request: times - 1 for request, times in done.items() if times > 1}
            if left:
                self._done[instance] = left
            if received or done:
                message = Ack(gateway=self._gateway, received=received, done=tuple(done))
                await self._bus.publish(self._subjects.attention(instance, "ack"), message)

    async def close(self, limit_s: float) -> None:
        """Last batch; cancellations get ``limit_s`` seconds more."""
        if self._cancels:
            await asyncio.wait(self._cancels.values(), timeout=limit_s)
        for task in list(self._cancels.values()):
            task.cancel()
        await self.flush()

    async def _cancel(self, instance: str, request: str) -> None:
        subject = self._subjects.attention(instance, "cancel")
        message = Cancel(request_id=request)
        give_up = asyncio.get_running_loop().time() + CANCEL_LIMIT_S
        while asyncio.get_running_loop().time() < give_up:
            try:
                await self._bus.request(subject, message, Decision, CANCEL_TIMEOUT_S)
            except BusUnavailable:
                await asyncio.sleep(ACK_EVERY_S)
            else:
                self.done(instance, request)
                return
