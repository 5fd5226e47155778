"""A raw reader of server-sent events over a real socket: sees bytes as they come and can hang up at any moment."""

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

LIMIT_S = 30.0


@dataclass
class RawStream:
    """An open response. ``lines`` keeps everything that was read."""

    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter
    status: int
    headers: dict[str, str]
    lines: list[str] = field(default_factory=list)

    async def line(self) -> str | None:
        """The next line of the body; None at its end. Takes the chunked framing apart."""
        async with asyncio.timeout(LIMIT_S):
            while "\n" not in self._rest:
                size = int(await self.reader.readline(), 16)
                data = await self.reader.readexactly(size + 2)
                if size == 0:
                    return None
                self._rest += data[:-2].decode()
        line, _, self._rest = self._rest.partition("\n")
        self.lines.append(line)
        return line

    _rest: str = ""

    async def events(self) -> AsyncIterator[dict[str, Any] | str]:
        """Parsed events, ``[DONE]`` and comments as text."""
        while (line := await self.line()) is not None:
            if line.startswith("data: {"):
                yield json.loads(line.removeprefix("data: "))
            elif line:
                yield line.removeprefix("data: ")

    async def all(self) -> list[Any]:
        return [event async for event in self.events()]

    def hang_up(self) -> None:
        self.writer.transport.abort()


@asynccontextmanager
async def post(url: str, path: str, body: dict[str, Any], **headers: str) -> AsyncIterator[RawStream]:
    """Send a request and read the response's headers; the body stays to be read."""
    where = urlsplit(url)
    reader, writer = await asyncio.open_connection(where.hostname, where.port)
    try:
        await send_request(writer, path, json.dumps(body).encode(), **headers)
        async with asyncio.timeout(LIMIT_S):
            status = int((await reader.readline()).split()[1])
            found = {}
            while line := (await reader.readline()).decode().strip():
                name, _, value = line.partition(": ")
                found[name.lower()] = value
        yield RawStream(reader, writer, status, found)
    finally:
        writer.close()


async def send_request(writer: asyncio.StreamWriter, path: str, data: bytes, **headers: str) -> None:
    lines = [
        f"POST {path} HTTP/1.1", "host: test", "content-type: application/json", f"content-length: {len(data)}",
        *(f"{name.replace('_', '-')}: {value}" for name, value in headers.items()),
    ]  # fmt: skip
    writer.write("\r\n".join(lines).encode() + b"\r\n\r\n" + data)
    await writer.drain()
