"""Routing of a real 2A1E mesh: recorded by the command, equal to the reference's gate, off when nobody asks."""

import asyncio
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import torch

from shared.bus import Bus
from shared.cli.status import look
from shared.kernels.cpu import CpuKernels
from shared.load_messages import Activated
from shared.messages import Kind, Subjects
from shared.models.decoder import StepInput
from shared.models.loader import open_checkpoint
from shared.models.local import LocalModel
from shared.models.precision import choose_precision
from shared.traces.load import load_trace
from shared.traces.wire import RoutingTrace, routing
from tests.integration.waiting import until
from tests.mesh import RunningMesh, running_mesh

MESH = "routing"
PROMPTS = [list(range(first, first + 5 + first % 17)) for first in range(10, 310, 50)]
OUTPUT = 4
Rows = dict[int, Counter[tuple[int, ...]]]
"""By layer: how often each set of experts was chosen."""


@pytest.fixture(scope="module")
def mesh() -> Iterator[RunningMesh]:
    with running_mesh(attention=2, experts=1, mesh=MESH, settings={"prefix_cache": "false"}) as running:
        yield running


async def start_recorder(mesh: RunningMesh, *arguments: Any) -> asyncio.subprocess.Process:
    command = ["trace", "record", "--nats", mesh.mesh.nats_url, "--mesh", MESH, *map(str, arguments)]
    return await asyncio.create_subprocess_exec(
        sys.executable, "-m", "shared.cli.main", *command, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )


async def complete(client: httpx.AsyncClient, url: str, prompt: list[int]) -> list[int]:
    """Prompt and output, but for the last token, which no step has computed."""
    body = {"prompt": prompt, "max_tokens": OUTPUT, "temperature": 0, "ignore_eos": True, "return_token_ids": True}
    answer = (await client.post(url + "/v1/completions", json=body)).json()
    return prompt + answer["choices"][0]["token_ids"][:-1]


def gated(sequences: list[list[int]]) -> Rows:
    """What the gates choose when one process computes every sequence at once."""
    cpu, checkpoint = torch.device("cpu"), open_checkpoint("")
    precision = choose_precision("auto", cpu, checkpoint)
    model = LocalModel(checkpoint, CpuKernels(1, precise=precision.precise), cpu, precision.tensors, 256)
    rows: Rows = {}
    for number, layer in model.experts._layers.items():
        spy_on(layer, rows.setdefault(number, Counter()))
    for tokens in sequences:
        length = len(tokens)
        blocks = torch.arange(length // 16 + 1, dtype=torch.int32).view(1, -1)
        positions = torch.arange(length)
        step = StepInput(
            torch.tensor(tokens), positions.int(), positions, torch.zeros(length, dtype=torch.int32), blocks,
            torch.tensor([length - 1]),
        )  # fmt: skip
        with torch.inference_mode():
            model.forward(step, model.decoder.new_cache(blocks.numel(), 16))
    return rows


def spy_on(layer: Any, rows: Counter[tuple[int, ...]]) -> None:
    gate = layer.gate

    def spy(hidden: torch.Tensor) -> Any:
        weights, ids = gate(hidden)
        rows.update(map(tuple, ids.sort(dim=1).values.tolist()))
        return weights, ids

    layer.gate = spy


async def test_what_is_recorded_and_reported_is_what_the_gates_choose(mesh: RunningMesh, tmp_path: Path) -> None:
    bus = await Bus.connect(mesh.mesh.nats_url, "test")
    senders: set[str] = set()
    reports: list[Activated] = []
    await bus.subscribe(routing(Subjects(MESH)), RoutingTrace, lambda m: senders.add(m.attention), ordered=True)
    await bus.subscribe(Subjects(MESH).activated, Activated, reports.append, ordered=True)
    recorder = await start_recorder(mesh, "--out", tmp_path / "t")
    await until(lambda: len(senders) == 2, "both instances record")
    async with httpx.AsyncClient(timeout=120) as client:
        sequences = await asyncio.gather(*(complete(client, mesh.url, prompt) for prompt in PROMPTS))
    expected = gated(sequences)
    total = sum(map(len, sequences))
    recorder.send_signal(signal.SIGINT)
    output, errors = await asyncio.wait_for(recorder.communicate(), 60)
    assert recorder.returncode == 0, errors.decode()
    assert f"{total} rows x 6 layers" in output.decode()
    assert "from 2 attention instances" in output.decode()
    assert "missing" not in errors.decode()

    exchanges = load_trace(tmp_path / "t")
    recorded: Rows = {layer: Counter() for layer in expected}
    for exchange in exchanges:
        recorded[exchange.layer].update(map(tuple, exchange.ids.tolist()))
    assert recorded == expected
    await until(lambda: sum(report.rows for report in reports) == 6 * total, "all exchanges are reported")
    assert activated(reports) == {
        (layer, frozenset(np.unique(e.ids).tolist())): 1 for layer in expected for e in exchanges if e.layer == layer
    }
    await bus.close()


def activated(reports: list[Activated]) -> dict[tuple[int, frozenset[int]], int]:
    """(layer, experts of an exchange), of all reports."""
    found = {}
    for report in reports:
        masks = np.frombuffer(report.masks, np.uint8).reshape(-1, 8 * -(-report.experts // 64))
        for bits in np.unpackbits(masks, axis=1, bitorder="little"):
            found[report.layer, frozenset(np.flatnonzero(bits).tolist())] = 1
    return found


async def test_a_killed_recorder_leaves_recording_off_and_what_it_wrote_can_be_read(
    mesh: RunningMesh, tmp_path: Path
) -> None:
    bus = await Bus.connect(mesh.mesh.nats_url, "test")
    messages: list[RoutingTrace] = []
    await bus.subscribe(routing(Subjects(MESH)), RoutingTrace, messages.append, ordered=True)
    recorder = await start_recorder(mesh, "--out", tmp_path / "t")
    await until(lambda: len({m.attention for m in messages}) == 2, "both instances record")
    await asyncio.to_thread(mesh.complete, prompt=PROMPTS[0], max_tokens=1)
    await until(lambda: any(m.records for m in messages), "something is recorded")
    recorder.kill()
    await recorder.communicate()
    await until(lambda: len({m.attention for m in messages if m.ended}) == 2, "the leases end")
    count = len(messages)
    await asyncio.to_thread(mesh.complete, prompt=PROMPTS[1], max_tokens=1)
    members = await asyncio.to_thread(mesh.call, look(mesh.mesh.nats_url, MESH))
    urls = [m.heartbeat.url for m in members[0] if m.heartbeat.kind is Kind.ATTENTION]
    async with httpx.AsyncClient() as client:
        pages = [(await client.get(url + "/metrics")).text for url in urls]
    assert ["moemesh_trace_recorders 0.0" in page for page in pages] == [True, True]
    assert len(messages) == count
    load_trace(tmp_path / "t")
    await bus.close()


async def test_a_limit_of_rows_ends_recording_and_a_trace_is_never_overwritten(
    mesh: RunningMesh, tmp_path: Path
) -> None:
    recorder = await start_recorder(mesh, "--out", tmp_path / "t", "--rows", 8)
    while recorder.returncode is None:
        await asyncio.to_thread(mesh.complete, prompt=PROMPTS[0], max_tokens=2)
        await asyncio.sleep(0)
    output, _ = await recorder.communicate()
    assert recorder.returncode == 0
    assert int(output.split(b": ")[1].split()[0]) >= 8
    again = await start_recorder(mesh, "--out", tmp_path / "t", "--seconds", 1)
    elsewhere = await start_recorder(mesh, "--out", tmp_path / "u", "--mesh", "nowhere", "--seconds", 1)
    (_, errors), (_, others) = await asyncio.gather(again.communicate(), elsewhere.communicate())
    assert (again.returncode, elsewhere.returncode) == (1, 1)
    assert b"File exists" in errors
    assert b"no attention instance of mesh 'nowhere'" in others
    assert not (tmp_path / "u").exists()
