"""NATS as moemesh uses it: typed messages, bounded handlers, clear errors, reconnects for ever.

Covers publish, request and subscribe; key-value buckets are in store.py. Knows no service and no subject. Everything
here belongs to one asyncio loop.
"""

import asyncio
import inspect
import logging
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Mapping
from contextvars import ContextVar
from functools import partial
from types import MappingProxyType
from typing import Self, TypeVar, cast

import nats.errors
from nats.aio.client import Client
from nats.aio.msg import Msg
from nats.aio.subscription import Subscription

from shared.errors import BadMessage, BusUnavailable, Refused
from shared.messages import Message
from shared.request_messages import Decision, RefusalCode
from shared.store import MAX_MESSAGE_BYTES, Store

PING_INTERVAL_S = 2
RECONNECT_WAIT_S = 0.2
CLOSE_LIMIT_S = 5.0
PENDING_MESSAGES = 16384
"""Per subscription; more are dropped and counted, because a reader that far behind will not catch up."""
REFUSED = "Moemesh-Refused"
"""Header of a reply that is a Decision although the request asked for something else."""

incoming_headers: ContextVar[Mapping[str, str]] = ContextVar("incoming_headers", default=MappingProxyType({}))
"""Headers of the message that the current handler was called for (trace context)."""

log = logging.getLogger(__name__)
T = TypeVar("T")
M = TypeVar("M", bound=Message)
Handler = Callable[[M], Awaitable[Message | None] | None]


class Bus:
    """One connection. ``connect`` makes it, ``close`` drains it; the methods in between survive a restart of NATS."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.lost_at: float | None = None
        """``time.monotonic()`` when the connection was lost; None while connected."""
        self.counts: Counter[str] = Counter()
        """Messages by fate: ``published``, ``dropped`` (not sent, NATS was away), ``malformed``, ``failed`` (handler),
        ``slow`` (lost, their reader was too slow), ``unanswered`` (requests)."""
        self.reconnects = 0
        self._client = Client()
        self._up = asyncio.Event()
        self._callbacks: list[Callable[[bool], None]] = []
        self._subscriptions: list[Subscription] = []
        self._tasks: set[asyncio.Task[None]] = set()
        self._closing = False

    @classmethod
    async def connect(cls, url: str, name: str, timeout: float = 10.0) -> Self:  # noqa: ASYNC109
        """Raises BusUnavailable when ``url`` does not answer within ``timeout`` seconds."""
        bus = cls(url)
        try:
            async with asyncio.timeout(timeout):
                await bus._connect(name)
        except (TimeoutError, OSError, ValueError, nats.errors.Error) as error:
            if not isinstance(error, TimeoutError):
                raise BusUnavailable(url, f"not a usable NATS URL ({error})") from error
            reason = bus._client.last_error
            await bus._client.close()
            raise BusUnavailable(url, f"no NATS server answers within {timeout:g} s ({reason})") from error
        return bus

    async def _connect(self, name: str) -> None:
        await self._client.connect(
            self.url,
            name=name,
            connect_timeout=2,
            reconnect_time_wait=cast(int, RECONNECT_WAIT_S),
            max_reconnect_attempts=-1,
            ping_interval=PING_INTERVAL_S,
            max_outstanding_pings=2,
            flush_timeout=2.0,
            error_cb=self._on_error,
            disconnected_cb=partial(self._on_connection, False),
            reconnected_cb=partial(self._on_connection, True),
        )
        self._up.set()

    @property
    def connected(self) -> bool:
        return self._up.is_set() and self._client.is_connected

    @property
    def closed(self) -> bool:
        """True after ``close``, and when the server refused us for good (e.g. changed credentials)."""
        return self._closing or self._client.is_closed

    def on_connection(self, callback: Callable[[bool], None]) -> None:
        """``callback(connected)`` in the asyncio thread, at every loss and every return of the connection."""
        self._callbacks.append(callback)

    async def until_connected(self, subject: str, timeout: float) -> None:  # noqa: ASYNC109
        """Wait for the connection. Raises BusUnavailable after ``timeout`` seconds."""
        try:
            async with asyncio.timeout(timeout):
                await self._up.wait()
        except TimeoutError as error:
            raise BusUnavailable(subject, f"NATS is away ({self.url})") from error

    async def publish(self, subject: str, message: Message, headers: dict[str, str] | None = None) -> None:
        """Send at most once. While NATS is away the message is dropped and counted: nobody wants it minutes later.

        Raises BadMessage when it is too long.
        """
        data = _encode(message)
        if not self.connected:
            self.counts["dropped"] += 1
            return
        try:
            await self._client.publish(subject, data, headers=headers)
            self.counts["published"] += 1
        except nats.errors.Error:
            self.counts["dropped"] += 1

    async def request(
        self,
        subject: str,
        message: Message,
        reply: type[M],
        timeout: float,  # noqa: ASYNC109
        headers: dict[str, str] | None = None,
    ) -> M:
        """Send and wait for the answer, at most once. Just after a restart of NATS a living service may not listen yet.

        Raises BusUnavailable when nobody listens or answers within ``timeout`` seconds, Refused when the service says
        no and ``reply`` is not Decision, BadMessage when the request is too long or the answer is malformed.
        """
        data = _encode(message)
        try:
            async with asyncio.timeout(timeout):
                await self.until_connected(subject, timeout)
                self.counts["published"] += 1
                raw = await cancellable(self._client.request(subject, data, timeout=timeout, headers=headers))
        except nats.errors.NoRespondersError as error:
            self.counts["unanswered"] += 1
            raise BusUnavailable(subject, "no service listens") from error
        except (TimeoutError, nats.errors.Error) as error:
            self.counts["unanswered"] += 1
            problem = f"no answer within {timeout:g} s" if self.connected else f"NATS is away ({self.url})"
            raise BusUnavailable(subject, problem) from error
        if raw.headers and REFUSED in raw.headers and reply is not Decision:
            decision = Decision.decode(raw.data)
            raise Refused(decision.code or "internal", decision.message)
        return reply.decode(raw.data)

    async def subscribe(
        self, subject: str, kind: type[M], handler: Handler[M], limit: int = 256, ordered: bool = False
    ) -> Callable[[], Awaitable[None]]:
        """Call ``handler`` for every message; returns a function that ends the subscription.

        At most ``limit`` handlers run at once, as tasks; more messages wait. What a handler returns is the reply;
        Refused becomes a Decision. With ``ordered``, ``handler`` is a plain function, called in line: no blocking.
        A malformed message is counted and, when somebody waits for a reply, refused as "invalid".
        """
        slots = asyncio.Semaphore(limit)

        async def receive(raw: Msg) -> None:
            try:
                message = kind.decode(raw.data)
            except BadMessage as error:
                await self._malformed(raw, error)
                return
            if ordered:
                handler(message)
                return
            await slots.acquire()
            task = asyncio.create_task(self._handle(raw, handler, message))
            self._tasks.add(task)
            task.add_done_callback(lambda _: slots.release())
            task.add_done_callback(partial(self._handled, raw))

        subscription = await self._client.subscribe(subject, cb=receive, pending_msgs_limit=PENDING_MESSAGES)
        self._subscriptions.append(subscription)
        await self._flush()
        return partial(self._unsubscribe, subscription)

    async def store(self, bucket: str, ttl: float | None = None) -> Store:
        """The key-value bucket, made when it is absent; keys expire ``ttl`` seconds after their last write.

        Raises BusUnavailable.
        """
        return await Store(self, self._client.jetstream(timeout=2.0), bucket, ttl).open()

    async def close(self) -> None:
        """Stop receiving, let running handlers finish, send what is pending; gives up after a few seconds each."""
        self._closing = True
        if self.connected:
            drains = [asyncio.create_task(subscription.drain()) for subscription in self._subscriptions]
            await asyncio.wait(drains, timeout=CLOSE_LIMIT_S) if drains else None
            for drain in drains:
                drain.cancel()
        if self._tasks:
            await asyncio.wait(self._tasks, timeout=CLOSE_LIMIT_S)
        for task in self._tasks:
            task.cancel()
        await self._flush()
        await self._client.close()

    # ---- handlers -----------------------------------------------------------------------------------------

    async def _handle(self, raw: Msg, handler: Handler[M], message: M) -> None:
        incoming_headers.set(raw.headers or {})
        try:
            result = handler(message)
            answer = await result if inspect.isawaitable(result) else result
        except Refused as error:
            await self._refuse(raw, cast(RefusalCode, error.code), error.message)
            return
        if answer is not None:
            await self._respond(raw, answer)

    def _handled(self, raw: Msg, task: asyncio.Task[None]) -> None:
        """A handler that failed is our defect: logged, and said to whoever waits."""
        self._tasks.discard(task)
        if task.cancelled() or (error := task.exception()) is None:
            return
        self.counts["failed"] += 1
        log.error("handler of %s failed", raw.subject, exc_info=error)
        if not self.closed:
            refusal = asyncio.create_task(self._refuse(raw, "internal", f"{type(error).__name__}: {error}"))
            self._tasks.add(refusal)
            refusal.add_done_callback(self._tasks.discard)

    async def _malformed(self, raw: Msg, error: BadMessage) -> None:
        self.counts["malformed"] += 1
        if self.counts["malformed"] == 1:
            log.warning("malformed message on %s (further ones are only counted): %s", raw.subject, error)
        await self._refuse(raw, "invalid", str(error))

    async def _refuse(self, raw: Msg, code: RefusalCode, message: str) -> None:
        await self._respond(raw, Decision(ok=False, code=code, message=message), {REFUSED: code})

    async def _respond(self, raw: Msg, answer: Message, headers: dict[str, str] | None = None) -> None:
        if raw.reply:
            await self.publish(raw.reply, answer, headers)

    async def _unsubscribe(self, subscription: Subscription) -> None:
        if subscription in self._subscriptions:
            self._subscriptions.remove(subscription)
            await subscription.unsubscribe()

    # ---- the connection -----------------------------------------------------------------------------------

    async def _flush(self) -> None:
        """Until the server has seen everything; a lost connection is no error, reconnecting repeats subscriptions."""
        if not self.connected:
            return
        try:
            await self._client.flush(timeout=2)
        except nats.errors.Error as error:
            log.debug("flush: %r", error)

    async def _on_connection(self, connected: bool) -> None:
        if connected == self._up.is_set():
            return
        self.lost_at = None if connected else time.monotonic()
        if connected:
            self._up.set()
            self.reconnects += 1
            log.info("NATS is back (%s)", self.url)
        else:
            self._up.clear()
            if not self._closing:
                log.warning("NATS is away (%s); reconnecting", self.url)
        for callback in self._callbacks:
            callback(connected)

    async def _on_error(self, error: Exception) -> None:
        if isinstance(error, nats.errors.SlowConsumerError):
            self.counts["slow"] += 1
        elif isinstance(error, nats.errors.Error | OSError | TimeoutError):
            log.debug("NATS: %r", error)
        else:  # nats-py sends what an ordered handler raises here
            self.counts["failed"] += 1
            log.error("handler failed", exc_info=error)


def _encode(message: Message) -> bytes:
    """Bytes of a message that is fit to travel. Raises BadMessage."""
    data = message.encode()
    if len(data) > MAX_MESSAGE_BYTES:
        raise BadMessage(type(message).__name__, f"{len(data)} bytes; the limit is {MAX_MESSAGE_BYTES}")
    return data


async def cancellable(work: Awaitable[T]) -> T:
    """The result of ``work``; raises CancelledError when this task was cancelled meanwhile.

    ``asyncio.wait_for`` of Python 3.11, which nats-py uses, drops a cancellation that comes together with the result.
    """
    task = asyncio.current_task()
    assert task is not None
    before = task.cancelling()
    result = await work
    if task.cancelling() > before:
        raise asyncio.CancelledError
    return result
