"""An attention instance that is alive but hangs: its requests go on elsewhere, or end with a reason within a bound."""

import signal
from collections.abc import Iterator

import pytest

from shared.cli.client import ApiError, stream_completion
from tests.mesh import RunningMesh, running_mesh

BODY = {"prompt": "In the beginning God created", "max_tokens": 200, "temperature": 0, "ignore_eos": True}
NAMES = ("attention-0", "attention-1")


@pytest.fixture(scope="module")
def mesh() -> Iterator[RunningMesh]:
    settings = {"no_attention_deadline": "3"}
    with running_mesh(attention=2, experts=1, mesh="hung", settings=settings) as running:
        try:
            yield running
        finally:
            for name in NAMES:
                send(running, name, signal.SIGCONT)


def send(mesh: RunningMesh, name: str, number: signal.Signals) -> None:
    process = mesh.mesh.children[name].process
    assert process is not None
    process.send_signal(number)


def test_streams_go_on_elsewhere_and_end_with_a_reason_when_nobody_is_left(mesh: RunningMesh) -> None:
    expected = mesh.complete(**BODY)["choices"][0]["text"]
    streams = [stream_completion(mesh.url, dict(BODY)) for _ in range(4)]
    begun = [next(stream) for stream in streams]
    send(mesh, "attention-0", signal.SIGSTOP)
    assert {a + "".join(rest) for a, rest in zip(begun, streams, strict=True)} == {expected}

    stream = stream_completion(mesh.url, dict(BODY))
    assert next(stream)
    send(mesh, "attention-1", signal.SIGSTOP)
    with pytest.raises(ApiError, match="attention instance"):
        list(stream)

    for name in NAMES:
        send(mesh, name, signal.SIGCONT)
    assert mesh.complete(**BODY)["choices"][0]["text"] == expected
