"""What the gateway's HTTP side does about connections: small writes, clients that leave, ports that cannot be."""

import asyncio
import socket

import pytest
from fastapi import Request

from services.gateway.main import _listening
from services.gateway.web import ClientGone, read_json
from shared.config import GatewayConfig
from shared.errors import ConfigError


async def test_small_answers_are_sent_at_once():
    """Nagle's algorithm would hold every second small write back until the client's delayed acknowledgement: 40 ms."""
    found: asyncio.Future[int] = asyncio.get_running_loop().create_future()

    def look(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        found.set_result(writer.get_extra_info("socket").getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY))
        writer.close()

    with _listening(GatewayConfig(port=0)) as listener:
        server = await asyncio.start_server(look, sock=listener)
        _, writer = await asyncio.open_connection(*listener.getsockname())
        assert await found
        writer.close()
        server.close()


def test_a_port_that_does_not_exist_is_refused_by_name():
    with pytest.raises(ConfigError, match="--port"), _listening(GatewayConfig(port=70000)):
        pass


async def test_a_client_that_leaves_inside_its_body_is_no_defect():
    messages = [{"type": "http.request", "body": b"{", "more_body": True}, {"type": "http.disconnect"}]

    async def receive():
        return messages.pop(0)

    scope = {"type": "http", "headers": [(b"content-type", b"application/json")]}
    with pytest.raises(ClientGone):
        await read_json(Request(scope, receive), 100)
