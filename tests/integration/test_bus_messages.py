"""Messages over a real NATS server: replies, refusals, bad bytes, limits, a server that goes away and comes back."""

import asyncio
import logging
import socket
from pathlib import Path

import nats
import pytest

from shared.bus import MAX_MESSAGE_BYTES, Bus, incoming_headers
from shared.errors import BadMessage, BusUnavailable, Refused
from shared.messages import Hello
from shared.nats_server import NatsServer, NatsServerError
from shared.request_messages import Ack, Decision, Resend
from tests.integration.waiting import until


async def echo(message: Hello) -> Hello:
    return message


async def test_what_a_handler_returns_is_the_reply(bus: Bus) -> None:
    await bus.subscribe("echo", Hello, echo)
    assert await bus.request("echo", Hello(id="x"), Hello, 5) == Hello(id="x")


async def test_headers_reach_the_handler(bus: Bus) -> None:
    async def seen(message: Hello) -> Hello:
        return Hello(id=incoming_headers.get().get("traceparent", "none"))

    await bus.subscribe("seen", Hello, seen)
    assert (await bus.request("seen", Hello(id=""), Hello, 5, {"traceparent": "00-ab"})).id == "00-ab"
    assert (await bus.request("seen", Hello(id=""), Hello, 5)).id == "none"


async def test_a_request_nobody_listens_to_fails_at_once(bus: Bus) -> None:
    with pytest.raises(BusUnavailable, match="no service listens"):
        await bus.request("nobody", Hello(id="x"), Decision, 600)


async def test_a_silent_service_is_unavailable_after_the_deadline(bus: Bus) -> None:
    async def silent(message: Hello) -> None:
        return None

    await bus.subscribe("silent", Hello, silent)
    with pytest.raises(BusUnavailable, match="no answer"):
        await bus.request("silent", Hello(id="x"), Decision, 0.2)


async def test_a_refusal_travels_as_data(bus: Bus) -> None:
    async def refuse(message: Hello) -> None:
        raise Refused("full", "come back later")

    await bus.subscribe("refuse", Hello, refuse)
    assert await bus.request("refuse", Hello(id="x"), Decision, 5) == Decision(
        ok=False, code="full", message="come back later"
    )
    with pytest.raises(Refused, match="come back later"):
        await bus.request("refuse", Hello(id="x"), Hello, 5)


async def test_a_defect_in_a_handler_is_logged_and_told_to_the_caller(
    bus: Bus, caplog: pytest.LogCaptureFixture
) -> None:
    async def broken(message: Hello) -> None:
        raise KeyError("oops")

    await bus.subscribe("broken", Hello, broken)
    decision = await bus.request("broken", Hello(id="x"), Decision, 5)
    assert (decision.ok, decision.code) == (False, "internal")
    assert bus.counts["failed"] == 1
    assert "KeyError: 'oops'" in caplog.text


@pytest.mark.parametrize("data", [b"", b"\xc1", b"\x91" * 4000, b"\x80", b"\xff" * 100])
async def test_malformed_messages_are_counted_logged_once_and_refused(
    bus: Bus, nats_server: NatsServer, caplog: pytest.LogCaptureFixture, data: bytes
) -> None:
    received: list[Resend] = []
    await bus.subscribe("typed", Resend, received.append, ordered=True)
    raw = await nats.connect(nats_server.url)
    try:
        with caplog.at_level(logging.WARNING):
            for _ in range(3):
                reply = await raw.request("typed", data, timeout=5)
                decision = Decision.decode(reply.data)
                assert (decision.ok, decision.code) == (False, "invalid")
    finally:
        await raw.close()
    assert bus.counts["malformed"] == 3
    assert caplog.text.count("malformed message on typed") == 1
    await bus.publish("typed", Resend(request_id="r", position=1))
    await until(lambda: received, "a good message after bad ones")


async def test_messages_over_the_limit_are_refused_before_they_are_sent(bus: Bus) -> None:
    await bus.subscribe("echo", Hello, echo)
    for attempt in (bus.publish("echo", big()), bus.request("echo", big(), Hello, 5)):
        with pytest.raises(BadMessage, match=str(MAX_MESSAGE_BYTES)):
            await attempt
    largest = Hello(id="x" * (MAX_MESSAGE_BYTES - 100))
    assert await bus.request("echo", largest, Hello, 5) == largest


def big() -> Hello:
    return Hello(id="x" * MAX_MESSAGE_BYTES)


async def test_an_ordered_handler_sees_messages_in_the_order_they_were_sent(bus: Bus) -> None:
    seen: list[str] = []
    await bus.subscribe("acks", Ack, lambda ack: seen.append(ack.gateway), ordered=True)
    for number in range(500):
        await bus.publish("acks", Ack(gateway=str(number)))
    await until(lambda: len(seen) == 500, "all messages")
    assert seen == [str(number) for number in range(500)]


async def test_a_slow_handler_does_not_hold_up_the_next_and_no_more_than_the_limit_run(bus: Bus) -> None:
    gate = asyncio.Event()
    running: list[str] = []

    async def slow(message: Hello) -> Hello:
        running.append(message.id)
        await gate.wait()
        return message

    await bus.subscribe("slow", Hello, slow, limit=3)
    requests = [asyncio.create_task(bus.request("slow", Hello(id=str(i)), Hello, 20)) for i in range(8)]
    await until(lambda: len(running) == 3, "three handlers at once")
    assert len(running) == 3
    gate.set()
    assert [reply.id for reply in await asyncio.gather(*requests)] == [str(i) for i in range(8)]


async def test_unsubscribing_ends_it(bus: Bus) -> None:
    unsubscribe = await bus.subscribe("echo", Hello, echo)
    await unsubscribe()
    await unsubscribe()
    with pytest.raises(BusUnavailable):
        await bus.request("echo", Hello(id="x"), Hello, 5)


async def test_subscriptions_outlive_a_killed_nats_server(bus: Bus, nats_server: NatsServer) -> None:
    other = await Bus.connect(nats_server.url, "other")
    await bus.subscribe("echo", Hello, echo)
    history: list[bool] = []
    bus.on_connection(history.append)
    for _ in range(2):
        await nats_server.kill()
        await until(lambda: bus.lost_at is not None and other.lost_at is not None, "the loss to be noticed")
        await other.publish("echo", Hello(id="nobody wants this later"))
        with pytest.raises(BusUnavailable, match="NATS is away"):
            await other.request("echo", Hello(id="x"), Hello, 0.1)
        await nats_server.start()
        await until(lambda: bus.connected and other.connected, "the return")
        assert await other.request("echo", Hello(id="x"), Hello, 10) == Hello(id="x")
    assert history == [False, True] * 2
    assert (other.counts["dropped"], other.counts["published"], other.counts["unanswered"]) == (2, 2, 2)
    assert bus.reconnects == other.reconnects == 2
    await other.close()


async def test_a_request_made_while_nats_is_away_is_sent_when_it_returns(bus: Bus, nats_server: NatsServer) -> None:
    await bus.subscribe("echo", Hello, echo)
    await nats_server.kill()
    await until(lambda: not bus.connected, "the loss")
    request = asyncio.create_task(bus.request("echo", Hello(id="x"), Hello, 20))
    await nats_server.start()
    assert await request == Hello(id="x")


async def test_closing_lets_running_handlers_answer(bus: Bus, nats_server: NatsServer) -> None:
    server = await Bus.connect(nats_server.url, "server")
    started, gate = asyncio.Event(), asyncio.Event()

    async def slow(message: Hello) -> Hello:
        started.set()
        await gate.wait()
        return message

    await server.subscribe("slow", Hello, slow)
    request = asyncio.create_task(bus.request("slow", Hello(id="x"), Hello, 10))
    await started.wait()
    closing = asyncio.create_task(server.close())
    await until(lambda: server.closed)
    gate.set()
    await closing
    assert await request == Hello(id="x")


async def test_no_server_and_bad_urls_are_clear_errors() -> None:
    with pytest.raises(BusUnavailable, match=r"127\.0\.0\.1:1.*no NATS server answers within 0.3 s"):
        await Bus.connect("nats://127.0.0.1:1", "x", 0.3)
    with pytest.raises(BusUnavailable, match="not a usable NATS URL"):
        await Bus.connect("nats://127.0.0.1:port", "x", 0.3)


async def test_a_nats_server_waits_for_its_port(tmp_path: Path) -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        server = NatsServer(tmp_path, other.getsockname()[1])
        starting = asyncio.create_task(server.start())
        await until(lambda: server.log_file.exists() and "address already in use" in server.log_file.read_text())
    await starting
    assert server.url.endswith(f":{server.port}")
    await server.stop()


async def test_a_nats_server_that_cannot_start_says_why(nats_server: NatsServer) -> None:
    with pytest.raises(NatsServerError, match="ended with status"):
        await NatsServer(nats_server.store_dir / "second", 0, host="256.0.0.1").start()
