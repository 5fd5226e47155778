"""Starts from a real checkpoint: the bytes of the file, and no crash when it is damaged under us."""

import os
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from services.experts.starts import Started, Starts, When
from shared.models.loader import Checkpoint, open_checkpoint
from shared.models.moe import expert_weights
from shared.models.presets import make_checkpoint
from shared.models.slots import HostSlots, tensors_of

CPU = torch.device("cpu")


def read(checkpoint: Checkpoint, layer: int, expert: int):
    return expert_weights(checkpoint, layer, expert, CPU, torch.float32)


class Bench:
    """A thread of starts over a checkpoint of its own."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.checkpoint = open_checkpoint(str(path))
        self.layer = self.checkpoint.spec.moe_layers[0]
        self.slots = HostSlots(4, read(self.checkpoint, self.layer, 0))
        self.woken = threading.Semaphore(0)
        self.starts = Starts(lambda: Checkpoint(self.checkpoint.source), read, self.slots, self.woken.release)

    def start(self, expert: int, slot: int) -> Started:
        self.starts.ask(self.layer, expert, slot, When.NOW)
        assert self.woken.acquire(timeout=60)
        [ended] = self.starts.ended()
        return ended

    def expected(self, expert: int) -> list[bytes]:
        return [t.view(torch.uint8).numpy().tobytes() for t in tensors_of(read(self.checkpoint, self.layer, expert))]


@pytest.fixture(params=["", "tiny-qwen3", "tiny-mixtral"])
def bench(request, tmp_path) -> Iterator[Bench]:
    path = tmp_path / "model"
    if request.param:
        make_checkpoint(request.param, path)
    else:
        shutil.copytree(open_checkpoint("").path, path)
    made = Bench(path)
    yield made
    made.starts.close()


def test_a_start_copies_the_bytes_of_the_file(bench):
    for slot, expert in enumerate([3, 0, 3]):
        ended = bench.start(expert, slot)
        assert (ended.problem, ended.expert, ended.slot) == ("", expert, slot)
        assert [t.view(torch.uint8).numpy().tobytes() for t in tensors_of(ended.weights)] == bench.expected(expert)
        assert ended.nbytes == sum(map(len, bench.expected(expert)))


def test_weights_that_were_replaced_by_others_of_the_same_size_are_not_mixed_with_the_old_ones(bench):
    assert bench.start(1, 0).problem == ""
    [file] = bench.path.glob("*.safetensors")
    shutil.copy(file, file.with_suffix(".new"))
    file.with_suffix(".new").rename(file)
    assert "was changed while it was in use" in bench.start(2, 1).problem
    assert "was changed while it was in use" in bench.start(2, 1).problem, "nor when it is opened again"


def test_a_file_that_is_cut_off_under_us_fails_the_start_and_names_the_file(bench):
    assert bench.start(1, 0).problem == ""
    [file] = bench.path.glob("*.safetensors")
    os.truncate(file, file.stat().st_size // 2)
    assert "was changed while it was in use" in bench.start(2, 1).problem
    assert file.name in bench.start(2, 1).problem, "opened again, it is no checkpoint"
