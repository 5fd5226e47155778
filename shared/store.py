"""Small values in JetStream key-value buckets, changed by compare-and-set.

Covers get, create, update by revision and delete. No watchers: their consumers die with the server, so readers ask
again when a heartbeat announces news. Values survive a restart of NATS on the same store directory; a bucket that is
gone is made again, empty.
"""

import logging
from collections.abc import Awaitable, Callable
from typing import Protocol, Self, TypeVar

import nats.errors
from nats.js import JetStreamContext
from nats.js.errors import (
    APIError,
    BadRequestError,
    KeyNotFoundError,
    KeyWrongLastSequenceError,
    NoStreamResponseError,
    NotFoundError,
    ServerError,
    ServiceUnavailableError,
)
from nats.js.kv import KeyValue

from shared.errors import BadMessage, BusUnavailable

MAX_MESSAGE_BYTES = 512 * 1024
"""Half of the server's default limit, which leaves room for headers and base64."""
CONNECT_WAIT_S = 2.0
STREAM_EXISTS = 10058
"""Error code of the server: the stream exists with other parameters."""

log = logging.getLogger(__name__)
T = TypeVar("T")


class Connection(Protocol):
    """What a store needs of the bus."""

    async def until_connected(self, subject: str, timeout: float) -> None:  # noqa: ASYNC109
        """Raises BusUnavailable."""
        ...


class Store:
    """One bucket, made by ``Bus.store``. Every method raises BusUnavailable when NATS does not answer.

    A write that ended in BusUnavailable may have happened: read again before deciding anything.
    """

    def __init__(self, bus: Connection, jetstream: JetStreamContext, bucket: str, ttl: float | None) -> None:
        self.bucket = bucket
        self.ttl = ttl
        """Seconds after its last write at which a key expires; once opened, what the bucket really has."""
        self._bus = bus
        self._jetstream = jetstream

    async def open(self) -> Self:
        """Make the bucket, or use the one that exists; then its time to live counts, not ours."""
        self._kv = await self._call("", self._open)
        actual = (await self._call("", self._kv.status)).ttl or None
        if actual != self.ttl:
            log.warning("bucket %s keeps its time to live of %s s (asked for: %s s)", self.bucket, actual, self.ttl)
        self.ttl = actual
        return self

    async def get(self, key: str) -> tuple[bytes, int] | None:
        """Value and revision, or None when the key is absent or expired."""
        try:
            entry = await self._call(key, lambda: self._kv.get(key))
        except NotFoundError:
            return None
        return entry.value or b"", int(entry.revision or 0)

    async def create(self, key: str, value: bytes) -> int | None:
        """Write a key that must not exist. Returns its revision, or None when somebody else was first."""
        return await self._write(key, value, lambda: self._kv.create(key, value))

    async def update(self, key: str, value: bytes, revision: int) -> int | None:
        """Replace the value of ``revision``. Returns the new revision, or None when the key has another one by now."""
        return await self._write(key, value, lambda: self._kv.update(key, value, last=revision))

    async def delete(self, key: str, revision: int) -> bool:
        """Remove the value of ``revision``; False when the key has another one by now."""
        try:
            await self._call(key, lambda: self._kv.delete(key, last=revision))
        except (BadRequestError, NoStreamResponseError):
            return False
        return True

    async def _open(self) -> KeyValue:
        try:
            return await self._jetstream.create_key_value(bucket=self.bucket, ttl=self.ttl, history=1)
        except BadRequestError as error:
            if error.err_code != STREAM_EXISTS:
                raise
            return await self._jetstream.key_value(self.bucket)

    async def _write(self, key: str, value: bytes, call: Callable[[], Awaitable[int]]) -> int | None:
        if len(value) > MAX_MESSAGE_BYTES:
            raise BadMessage(f"{self.bucket}/{key}", f"{len(value)} bytes; the limit is {MAX_MESSAGE_BYTES}")
        try:
            return await self._call(key, call)
        except (KeyWrongLastSequenceError, KeyNotFoundError):
            return None  # the latter: it expired while nats-py looked at it
        except NoStreamResponseError:
            await self.open()  # NATS came back without its store
            return None

    async def _call(self, key: str, call: Callable[[], Awaitable[T]]) -> T:
        """Answers of JetStream pass, refusals as nats-py raises them; silence becomes BusUnavailable."""
        where = f"{self.bucket}/{key}"
        await self._bus.until_connected(where, CONNECT_WAIT_S)
        try:
            return await call()
        except (ServiceUnavailableError, nats.errors.NoRespondersError) as error:
            raise BusUnavailable(where, "JetStream does not answer; start nats-server with -js") from error
        except ServerError as error:
            raise BusUnavailable(where, str(error)) from error
        except (APIError, NoStreamResponseError):
            raise
        except (nats.errors.Error, TimeoutError) as error:
            raise BusUnavailable(where, f"NATS did not answer: {error!r}") from error
