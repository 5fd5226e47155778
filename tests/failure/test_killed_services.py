"""kill -9 of any service: nobody waits for ever, nothing changes that should not, and the mesh serves again."""

import asyncio
import concurrent.futures
import threading
from collections.abc import Iterator

import httpx
import pytest

from shared.cli.client import ApiError, stream_completion
from tests.mesh import RunningMesh, running_mesh

BODY = {"prompt": "In the beginning God created", "max_tokens": 60, "temperature": 0, "ignore_eos": True}


@pytest.fixture(scope="module")
def mesh() -> Iterator[RunningMesh]:
    with running_mesh(attention=1, experts=2, mesh="failure") as running:
        yield running


@pytest.fixture(scope="module")
def expected(mesh: RunningMesh) -> str:
    return mesh.complete(**BODY)["choices"][0]["text"]


def serves_again(mesh: RunningMesh, expected: str) -> None:
    """A client that retries on 503, as the official one does, gets the same text."""
    transport = httpx.HTTPTransport()
    with httpx.Client(timeout=120, transport=transport) as client:
        for _ in range(600):
            try:
                answer = client.post(mesh.url + "/v1/completions", json=BODY)
            except httpx.TransportError:
                mesh.call(pause(0.1))
                continue
            if answer.status_code == 200:
                assert answer.json()["choices"][0]["text"] == expected
                return
            assert answer.status_code == 503, answer.text
            mesh.call(pause(0.1))
    pytest.fail("the mesh did not serve again")


async def pause(seconds: float) -> None:
    await asyncio.sleep(seconds)


def streams(mesh: RunningMesh, count: int) -> list[concurrent.futures.Future[str]]:
    """``count`` streamed completions that have begun, each on a thread; results are the joined texts."""
    pool, begun = concurrent.futures.ThreadPoolExecutor(count), threading.Semaphore(0)
    running = [pool.submit(joined_stream, mesh.url, begun) for _ in range(count)]
    assert all(begun.acquire(timeout=120) for _ in running), "a stream did not begin"
    return running


def joined_stream(url: str, begun: threading.Semaphore) -> str:
    pieces = stream_completion(url, dict(BODY))
    try:
        first = next(pieces)
    finally:
        begun.release()
    return first + "".join(pieces)


def test_killing_one_of_two_homes_changes_no_byte(mesh: RunningMesh, expected: str) -> None:
    running = streams(mesh, 8)
    mesh.kill("experts-0")
    assert {f.result(180) for f in running} == {expected}
    serves_again(mesh, expected)


@pytest.mark.parametrize("name", ["scheduler-0", "attention-0", "experts-1"])
def test_the_mesh_serves_again_after_a_service_was_killed(mesh: RunningMesh, expected: str, name: str) -> None:
    mesh.kill(name)
    serves_again(mesh, expected)


def test_killing_attention_under_streams_leaves_no_client_waiting(mesh: RunningMesh, expected: str) -> None:
    running = streams(mesh, 4)
    mesh.kill("attention-0")
    for future in running:
        try:
            assert future.result(180) == expected
        except ApiError as error:
            print("a stream ended with an error:", error)
    serves_again(mesh, expected)


def test_killing_the_gateway_ends_its_streams_and_frees_their_blocks(mesh: RunningMesh, expected: str) -> None:
    """The dead gateway's clients hear of it at once, its requests are dropped, and it comes back on the same port."""
    read = mesh.metrics_of("attention-0")
    dropped = 'moemesh_requests_total{outcome="cancelled"}'
    before = read(dropped)
    body = BODY | {"max_tokens": 1900}
    running = [stream_completion(mesh.url, dict(body)) for _ in range(3)]
    for stream in running:
        assert next(stream)
    assert read("moemesh_kv_blocks_used") > 0
    mesh.kill("gateway-0")
    for stream in running:
        with pytest.raises(ApiError):
            list(stream)
    for _ in range(600):
        if read("moemesh_kv_blocks_used") == 0:
            break
        mesh.call(pause(0.1))
    assert read("moemesh_kv_blocks_used") == 0
    assert read(dropped) == before + len(running)
    serves_again(mesh, expected)
    assert mesh.mesh.children["gateway-0"].restarts == 1


def test_a_restart_of_nats_under_sixteen_streams_changes_no_byte(mesh: RunningMesh, expected: str) -> None:
    running = streams(mesh, 16)
    assert mesh.mesh.nats is not None
    mesh.call(mesh.mesh.nats.kill())
    mesh.call(mesh.mesh.nats.start())
    assert {f.result(240) for f in running} == {expected}
    serves_again(mesh, expected)
