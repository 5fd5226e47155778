"""Trouble behind the gateway: the client gets the same text, or a clear answer in time."""

import asyncio
import signal
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import httpx
import pytest

from shared.load_messages import Served
from shared.messages import Subjects
from shared.request_messages import Decision
from tests.api.sse import post, send_request
from tests.api.stack import FakeMesh, fake_mesh, until

BODY = {"prompt": "In the beginning", "max_tokens": 60, "seed": 2, "logprobs": 1, "return_token_ids": True}
STREAM = BODY | {"stream": True}


@pytest.fixture
async def http(mesh_of_two: FakeMesh) -> AsyncIterator[httpx.AsyncClient]:
    async with httpx.AsyncClient(base_url=mesh_of_two.url, timeout=60) as client:
        yield client


@pytest.fixture
def mesh(mesh_of_two: FakeMesh) -> FakeMesh:
    return mesh_of_two


async def complete(http: httpx.AsyncClient, **fields) -> dict:
    response = await http.post("/v1/completions", json=BODY | fields)
    assert response.status_code == 200, response.text
    return response.json()["choices"][0]


async def streamed(mesh: FakeMesh, begun: list[int] | None = None, **fields) -> tuple[str, list[int]]:
    """Joined text and token ids of a stream that must end well; ``begun`` gets its status when it is accepted."""
    async with post(mesh.url, "/v1/completions", STREAM | fields) as stream:
        if begun is not None:
            begun.append(stream.status)
        *events, done = await stream.all()
    assert done == "[DONE]"
    assert all("error" not in e for e in events), events[-1]
    choices = [e["choices"][0] for e in events]
    assert [c["finish_reason"] for c in choices if c["finish_reason"]] == ["length"]
    return "".join(c["text"] for c in choices), [t for c in choices for t in c["token_ids"]]


def all_faults(mesh: FakeMesh, **faults) -> None:
    for fake in mesh.fakes:
        for name, value in faults.items():
            setattr(fake.faults, name, value)


def slowly(mesh: FakeMesh, step_s: float = 0.01) -> None:
    for fake in mesh.fakes:
        fake.step_s = step_s


async def error_status(http: httpx.AsyncClient, **fields) -> tuple[int, dict, httpx.Headers]:
    response = await http.post("/v1/completions", json=BODY | fields)
    return response.status_code, response.json()["error"], response.headers


# ---- messages ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "faults",
    [
        {"drop": lambda i: i % 3 == 1},
        {"drop": lambda i: i < 2},
        {"drop": lambda i: i == 59},
        {"repeat": lambda i: i % 2 == 0},
        {"delay": lambda i: 0.03 * (i % 4 == 0)},
        {"drop": lambda i: i % 7 == 3, "repeat": lambda i: i % 5 == 0, "delay": lambda i: 0.02 * (i % 3 == 0)},
    ],
    ids=["drop every third", "drop the first", "drop the last", "repeat", "overtake", "all together"],
)
async def test_lost_doubled_and_late_messages_change_nothing(mesh, http, faults):
    clean = await complete(http)
    all_faults(mesh, **faults)
    for fake in mesh.fakes:
        fake._sent = 0
    text, tokens = await streamed(mesh)
    assert (text, tokens) == (clean["text"], clean["token_ids"])


async def test_prompt_logprobs_survive_a_lost_first_message(mesh, http):
    clean = await complete(http, echo=True)
    for fake in mesh.fakes:
        fake._sent = 0
    all_faults(mesh, drop=lambda i: i == 0)
    assert await complete(http, echo=True) == clean


async def test_received_tokens_are_acknowledged_and_finished_requests_forgotten(mesh, http):
    await complete(http)
    await until(lambda: all(not fake.work for fake in mesh.fakes))
    assert sum(len(fake.done) for fake in mesh.fakes) == 1
    assert not any(fake.cancelled for fake in mesh.fakes)


# ---- instances --------------------------------------------------------------------------------------------


async def test_requests_spread_over_instances(mesh, http):
    slowly(mesh)
    await asyncio.gather(*(complete(http, max_tokens=20) for _ in range(8)))
    assert sorted(len(fake.submits) for fake in mesh.fakes) == [4, 4]


async def test_a_refusing_instance_is_passed_over(mesh, http):
    for code in ("full", "draining", "no_experts"):
        mesh.fakes[0].faults.refuse = Decision(ok=False, code=code, message="no")
        await complete(http, max_tokens=2)
    assert len(mesh.fakes[0].submits) == len(mesh.fakes[1].submits) == 3


@pytest.mark.parametrize(
    ("code", "status"), [("full", 503), ("draining", 503), ("too_long", 400), ("invalid", 400), ("internal", 500)]
)
async def test_refusals_have_their_status(mesh, http, code, status):
    all_faults(mesh, refuse=Decision(ok=False, code=code, message="secret detail" if status == 500 else "because"))
    found, error, headers = await error_status(http)
    assert found == status
    assert ("retry-after" in headers) == (status == 503)
    assert ("secret" in error["message"]) is False
    assert (await http.get("/health")).status_code == 200
    async with post(mesh.url, "/v1/completions", STREAM) as stream:
        assert stream.status == status


async def test_a_lost_instance_is_replaced_in_the_middle_of_a_stream(mesh, http):
    """The other one gets prompt and tokens so far; the text goes on exactly, logprobs included."""
    clean = await complete(http)
    mesh.fakes[0].faults.die_at = 25
    mesh.fakes[1].faults.refuse = Decision(ok=False, code="full")
    reading = asyncio.create_task(streamed(mesh))
    await until(lambda: mesh.fakes[0].work and any(w.deltas for w in mesh.fakes[0].work.values()))
    mesh.fakes[1].faults.refuse = None
    assert await reading == (clean["text"], clean["token_ids"])
    resumed = mesh.fakes[1].submits[-1]
    assert len(resumed.output) == 4 * 25


async def test_a_plain_request_survives_an_instance_too(mesh, http):
    clean = await complete(http)
    mesh.fakes[0].faults.die_at = 10
    mesh.fakes[1].faults.die_at = 30
    third = asyncio.create_task(mesh.add(id="attention-9"))
    assert await complete(http) == clean
    await third


async def test_an_instance_that_comes_back_with_its_id_gets_its_requests_again(mesh, http):
    clean = await complete(http)
    lone, other = mesh.fakes
    await other.stop()
    lone.faults.die_at = 20
    reading = asyncio.create_task(streamed(mesh))
    await until(lambda: not lone._unsubscribe)
    await mesh.add(id=lone.id)
    assert await reading == (clean["text"], clean["token_ids"])


async def test_an_instance_that_drains_hands_its_requests_on(mesh, http):
    clean = await complete(http)
    mesh.fakes[0].faults.fail_at = mesh.fakes[1].faults.fail_at = 15
    mesh.fakes[0].faults.failures = mesh.fakes[1].faults.failures = 1
    mesh.fakes[0].faults.error = Decision(ok=False, code="draining", message="leaving")
    mesh.fakes[1].faults.error = Decision(ok=False, code="no_experts", message="none")
    assert await streamed(mesh) == (clean["text"], clean["token_ids"])


async def test_a_request_that_every_instance_gives_up_ends(mesh, http):
    all_faults(mesh, fail_at=1, error=Decision(ok=False, code="draining", message="leaving"))
    status, error, _ = await error_status(http)
    assert status == 503 and error["message"]


async def test_an_error_in_the_middle_of_a_stream_is_an_event_then_done(mesh):
    all_faults(mesh, fail_at=5)
    async with post(mesh.url, "/v1/completions", STREAM) as stream:
        assert stream.status == 200
        events = await stream.all()
    assert events[-1] == "[DONE]"
    assert events[-2]["error"]["type"] == "server_error"
    assert "secret" not in events[-2]["error"]["message"]
    assert len(events) >= 3


async def test_not_ready_says_why(mesh, http):
    async def expect(reason: str) -> None:
        await mesh.until_status("/ready", 503)
        response = await http.get("/ready")
        assert reason in response.json()["error"]["message"]
        status, _, headers = await error_status(http)
        assert status == 503 and headers["retry-after"]
        assert (await http.get("/health")).status_code == 200

    for fake in mesh.fakes:
        await fake.say(stalled=True)
    await expect("waits for an expert home")
    for fake in mesh.fakes:
        await fake.say(stalled=False, placement=0)
    await expect("no placement")
    for fake in mesh.fakes:
        fake.model = fake.model.model_copy(update={"digest": "other"})
        await fake.say(placement=1)
    await expect("another model")
    for fake in mesh.fakes:
        await fake.stop()
    await expect("no attention instance")
    await mesh.add(id="attention-9")
    await mesh.until_status("/ready", 200)
    await complete(http)


# ---- NATS -------------------------------------------------------------------------------------------------


async def test_nats_restarts_under_streams_and_the_same_bytes_arrive(mesh, http):
    clean = [await complete(http, seed=seed) for seed in range(16)]
    slowly(mesh, 0.02)
    begun: list[int] = []
    streams = [asyncio.create_task(streamed(mesh, begun, seed=seed)) for seed in range(16)]
    await until(lambda: len(begun) == 16)  # the gateway knows that they are accepted, too
    await mesh.nats.stop()
    await asyncio.sleep(0.3)  # tokens are made meanwhile and lost
    await mesh.nats.start()
    found = await asyncio.gather(*streams)
    assert found == [(c["text"], c["token_ids"]) for c in clean]


async def test_without_nats_requests_are_refused_and_the_process_lives(mesh, http):
    await mesh.nats.stop()
    await mesh.until_status("/ready", 503)
    status, error, headers = await error_status(http)
    assert status == 503 and headers["retry-after"] and "NATS" in error["message"]
    assert (await http.get("/health")).status_code == 200
    assert (await http.get("/v1/models")).status_code == 200
    await mesh.nats.start()
    await mesh.until_status("/ready", 200)
    await complete(http)


# ---- clients ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("silent_at", [0, 3])
async def test_a_client_that_leaves_cancels_its_request(mesh, http, stream, silent_at):
    """Before the first token, in the middle of a stream, and while a plain request runs."""
    slowly(mesh)
    all_faults(mesh, silent_at=silent_at)
    url = httpx.URL(mesh.url)
    reader, writer = await asyncio.open_connection(url.host, url.port)
    await send_request(writer, "/v1/completions", httpx.Request("POST", "/", json=BODY | {"stream": stream}).content)
    if stream and silent_at:
        await reader.readuntil(b"data: ")
    await until(lambda: any(f.work for f in mesh.fakes))
    writer.transport.abort()
    await until(lambda: any(f.cancelled for f in mesh.fakes) and not any(f.work for f in mesh.fakes))
    all_faults(mesh, silent_at=None)
    await complete(http, max_tokens=2)


async def test_a_client_that_leaves_cancels_all_its_choices(mesh):
    slowly(mesh)
    async with post(mesh.url, "/v1/completions", STREAM | {"n": 5}) as stream:
        await stream.line()
        stream.hang_up()
    await until(lambda: sum(len(f.cancelled) for f in mesh.fakes) == 5)


async def test_a_stop_string_cancels_the_rest(mesh, http):
    slowly(mesh)
    whole = (await complete(http))["text"]
    found = await complete(http, stop=whole[10:13])
    assert found["finish_reason"] == "stop" and found["stop_reason"] == whole[10:13]
    await until(lambda: any(f.cancelled for f in mesh.fakes))


async def test_the_end_of_sequence_token_has_no_text_but_counts(mesh, http):
    for fake in mesh.fakes:
        fake.script = lambda prompt, seed: [72, 72, 0, 72, 72]
    response = (await http.post("/v1/completions", json=BODY)).json()
    choice = response["choices"][0]
    assert (choice["finish_reason"], choice["stop_reason"]) == ("stop", None)
    assert choice["token_ids"] == [72, 72, 0] and choice["text"] == "hh"
    assert response["usage"]["completion_tokens"] == 3
    ignored = await complete(http, ignore_eos=True)
    assert ignored["token_ids"] == [72, 72, 0, 72, 72] and ignored["text"] == "hhhh"
    shown = await complete(http, ignore_eos=True, skip_special_tokens=False)
    assert shown["text"] == "hh<|endoftext|>hh" and shown["logprobs"]["text_offset"] == [0, 1, 2, 15, 16]
    own = await complete(http, ignore_eos=True, stop_token_ids=[72], min_tokens=1)
    assert (own["token_ids"], own["text"], own["stop_reason"]) == ([72, 72], "h", 72)


@pytest.mark.parametrize("chunk", [1, 3, 100])
async def test_split_characters_and_stops_are_the_same_in_any_message_size(mesh, http, chunk):
    text = "é漢字😀 STOP é"
    ids = (await http.post("/tokenize", json={"prompt": text})).json()["tokens"]
    for fake in mesh.fakes:
        fake.script, fake.chunk = lambda prompt, seed: ids, chunk
    assert (await complete(http))["text"] == text
    assert (await streamed(mesh))[0] == text
    found = await complete(http, stop=["TOP", "OP é"])
    assert (found["text"], found["stop_reason"]) == ("é漢字😀 S", "TOP")
    assert found["token_ids"] == (await complete(http, stop=["TOP"]))["token_ids"]


# ---- limits -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("silent_at", [0, 4])
async def test_nobody_waits_past_the_deadline(tmp_path, silent_at):
    async with fake_mesh(tmp_path, request_deadline=1.5) as mesh:
        all_faults(mesh, silent_at=silent_at)
        async with httpx.AsyncClient(base_url=mesh.url, timeout=30) as http:
            status, error, headers = await error_status(http)
        assert (status, error["code"], headers["x-should-retry"]) == (504, "deadline", "false")
        async with post(mesh.url, "/v1/completions", STREAM) as stream:
            assert stream.status == (200 if silent_at else 504)
            if silent_at:
                assert (await stream.all())[-2]["error"]["code"] == "deadline"
        await until(lambda: len(mesh.fake.cancelled) >= 2)


async def test_a_lost_only_instance_ends_at_the_deadline(tmp_path):
    async with fake_mesh(tmp_path, request_deadline=3.0) as mesh:
        mesh.fake.faults.die_at = 3
        async with post(mesh.url, "/v1/completions", STREAM) as stream:
            events = await stream.all()
        assert events[-1] == "[DONE]" and "error" in events[-2]


@pytest.mark.parametrize("trouble", ["die_at", "silent_at"])
async def test_a_request_waits_for_another_instance_only_so_long(tmp_path, trouble):
    """Gone without a word, or alive but without an answer to anything (and then without heartbeats)."""
    async with fake_mesh(tmp_path, no_attention_deadline=1.0) as mesh:
        setattr(mesh.fake.faults, trouble, 3)
        async with post(mesh.url, "/v1/completions", STREAM) as stream:
            await stream.line()
            if trouble == "silent_at":
                await mesh.fake.die()
            events = await stream.all()
        assert events[-1] == "[DONE]"
        assert events[-2]["error"]["code"] == "lost" and "attention instance" in events[-2]["error"]["message"]


async def test_a_full_server_says_so_and_recovers(tmp_path):
    async with fake_mesh(tmp_path, max_queue=3) as mesh, httpx.AsyncClient(base_url=mesh.url, timeout=30) as http:
        mesh.fake.step_s = 0.05
        told: list[Served] = []
        await mesh.bus.subscribe(Subjects(mesh.mesh).served, Served, told.append, ordered=True)
        async with post(mesh.url, "/v1/completions", STREAM | {"n": 2}) as stream:
            await stream.line()
            status, error, headers = await error_status(http, n=2)
            assert (status, error["code"]) == (503, "full") and headers["retry-after"]
            await complete(http, max_tokens=1)
            stream.hang_up()
        await until(lambda: len(mesh.fake.cancelled) == 2)
        await complete(http, n=3, max_tokens=1)
        assert (await error_status(http, n=4))[0] == 400
        await until(lambda: sum(report.arrived for report in told) == 2 + 2 + 1 + 3)
        assert sum(report.refused for report in told) == 2, "those that could have been served another time"


async def test_bodies_over_the_limit(tmp_path):
    async with (
        fake_mesh(tmp_path, max_body="1KiB", api_key="") as mesh,
        httpx.AsyncClient(base_url=mesh.url) as http,
    ):

        async def endless() -> AsyncIterator[bytes]:
            for _ in range(1000):
                yield b"x" * 1000

        kind = {"content-type": "application/json"}
        for content in (b"x" * 5000, endless()):
            response = await http.post("/v1/completions", content=content, headers=kind)
            assert response.status_code == 413
            assert "1024 bytes" in response.json()["error"]["message"]
        await complete(http)


async def test_the_api_key(tmp_path):
    async with fake_mesh(tmp_path, api_key="sesame") as mesh, httpx.AsyncClient(base_url=mesh.url) as http:
        for headers in ({}, {"authorization": "Bearer wrong"}, {"authorization": "sesame"}):
            for path in ("/v1/completions", "/v1/chat/completions", "/tokenize", "/detokenize"):
                response = await http.post(path, json=BODY, headers=headers)
                assert response.status_code == 401 and response.json()["error"]["code"] == "invalid_api_key"
            assert (await http.get("/v1/models", headers=headers)).status_code == 401
        for path in ("/health", "/ready", "/metrics", "/version"):
            assert (await http.get(path)).status_code == 200
        good = {"authorization": "Bearer sesame"}
        assert (await http.post("/v1/completions", json=BODY, headers=good)).status_code == 200


async def test_sixty_four_streams_at_once(mesh, http):
    clean = [(await complete(http, seed=seed))["text"] for seed in range(0, 64, 8)]
    found = await asyncio.gather(*(streamed(mesh, seed=seed) for seed in range(64)))
    assert [text for text, _ in found[::8]] == clean


async def test_a_callers_trace_reaches_the_attention_instance(tmp_path):
    """The endpoint is never reached: only the headers matter here."""
    trace = "0af7651916cd43dd8448eb211c80319c"
    async with fake_mesh(tmp_path, otlp_endpoint="http://127.0.0.1:9") as mesh:
        async with post(mesh.url, "/v1/completions", STREAM, traceparent=f"00-{trace}-b7ad6b7169203331-01") as stream:
            await stream.all()
        assert mesh.fake.submits[-1].trace["traceparent"].split("-")[1] == trace


# ---- the process ------------------------------------------------------------------------------------------


@asynccontextmanager
async def second_gateway(mesh: FakeMesh, **settings: str) -> AsyncIterator[tuple[asyncio.subprocess.Process, str]]:
    """A gateway process of its own, and its URL; it has to end with status 0 once the context is left."""
    code = "import sys; from shared.cli.serve import run_service; sys.exit(run_service('gateway', {}))"
    wanted = {"mesh": mesh.mesh, "nats": mesh.nats.url, "port": "0", "id": "second"} | settings
    env = {f"MOEMESH_{k.upper()}": v for k, v in wanted.items()}
    process = await asyncio.create_subprocess_exec(sys.executable, "-c", code, env=env, cwd=Path.cwd())
    try:
        member = await until(lambda: (m := mesh.members.get("second")) and m.ready and m, 60)
        yield process, member.heartbeat.url
        async with asyncio.timeout(30):
            assert await process.wait() == 0
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()


async def test_sigterm_lets_open_streams_finish(mesh: FakeMesh):
    """New connections are refused, the open stream ends as if nothing had happened."""
    async with second_gateway(mesh) as (process, url):
        slowly(mesh, 0.02)
        async with post(url, "/v1/completions", STREAM) as stream:
            await stream.line()
            process.send_signal(signal.SIGTERM)
            events = await stream.all()
        assert events[-1] == "[DONE]" and events[-2]["choices"][0]["finish_reason"] == "length"


async def test_what_is_open_when_draining_ends_is_told_why(mesh: FakeMesh):
    """A stream by an error event, a plain request by 503; both are cancelled where they were computed."""
    async with second_gateway(mesh, drain_s="0.5") as (process, url):
        all_faults(mesh, silent_at=3)
        async with httpx.AsyncClient(timeout=30) as http, post(url, "/v1/completions", STREAM) as stream:
            await stream.line()
            plain = asyncio.create_task(http.post(url + "/v1/completions", json=BODY))
            await until(lambda: sum(len(fake.work) for fake in mesh.fakes) == 2)
            process.send_signal(signal.SIGTERM)
            events = await stream.all()
            assert (await plain).status_code == 503
        assert events[-1] == "[DONE]"
        assert events[-2]["error"]["code"] == "draining" and "stopping" in events[-2]["error"]["message"]
        await until(lambda: sum(len(fake.cancelled) for fake in mesh.fakes) == 2)
