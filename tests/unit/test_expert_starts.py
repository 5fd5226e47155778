"""Starts from a real checkpoint: the bytes of the file, and no crash when it is damaged under us."""

import os
import shutil
import threading
import time
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


@pytest.mark.parametrize("copies", [False, True])
def test_experts_are_looked_up_ahead_unless_that_makes_copies(copies):
    checkpoint, asked, woken = open_checkpoint(""), [], threading.Semaphore(0)
    every = [(layer, e) for layer in checkpoint.spec.moe_layers for e in range(checkpoint.spec.router.experts)]

    def counting(opened: Checkpoint, layer: int, expert: int):
        asked.append((layer, expert))
        weights = read(opened, layer, expert)
        return tuple(w.clone() for w in tensors_of(weights)) if copies else weights

    slots = HostSlots(1, read(checkpoint, *every[0]))
    starts = Starts(lambda: Checkpoint(checkpoint.source), counting, slots, woken.release, every)
    while starts._ahead:
        time.sleep(0.001)
    starts.ask(*every[-1], 0, When.NOW)
    assert woken.acquire(timeout=60)
    starts.close()
    assert asked == ([every[0], every[-1]] if copies else every)


class Held:
    """Starts of which each waits until it is let through."""

    def __init__(self) -> None:
        checkpoint = open_checkpoint("")
        self.layers = checkpoint.spec.moe_layers
        self.gates = {expert: threading.Event() for expert in range(4)}
        self.begun = {expert: threading.Event() for expert in range(4)}
        self.woken = threading.Semaphore(0)
        slots = HostSlots(4, read(checkpoint, self.layers[0], 0))
        self.starts = Starts(lambda: Checkpoint(checkpoint.source), self._read, slots, self.woken.release)

    def _read(self, checkpoint: Checkpoint, layer: int, expert: int):
        self.begun[expert].set()
        assert self.gates[expert].wait(60)
        return read(checkpoint, layer, expert)

    def ask(self, expert: int, when: When, layer: int = 0) -> None:
        self.starts.ask(self.layers[layer], expert, expert, when)

    def let(self, *experts: int) -> None:
        for expert in experts:
            self.gates[expert].set()

    def next(self) -> list[int]:
        """The experts that have been started when somebody is woken."""
        assert self.woken.acquire(timeout=60)
        ended = self.starts.ended()
        assert not any(started.problem for started in ended)
        return [started.expert for started in ended]


@pytest.fixture
def held() -> Iterator[Held]:
    made = Held()
    yield made
    made.let(*made.gates)
    made.starts.close()


def test_who_waits_for_nothing_is_woken_when_all_is_done(held):
    for expert in (0, 1, 2):
        held.ask(expert, When.NEXT)
    held.let(0, 1, 2)
    assert held.next() == [0, 1, 2]
    held.starts.close()
    assert not held.woken.acquire(blocking=False)


def test_who_waits_for_one_of_many_is_woken_when_it_is_there(held):
    held.ask(0, When.NEXT)
    assert held.begun[0].wait(60)
    held.ask(1, When.NEXT)
    held.starts.urge(held.layers[0], 0)  # it is being started
    held.let(0)
    assert held.next() == [0]


def test_who_waits_for_a_slot_is_woken_after_the_next_start(held):
    for expert in (0, 1, 2):
        held.ask(expert, When.LATER)
    held.starts.urge_any()
    held.let(0)
    assert held.next() == [0]
    held.let(1, 2)
    assert held.next() == [1, 2]


def test_experts_of_a_layer_that_are_waited_for_wake_once(held):
    held.ask(0, When.NOW)
    assert held.begun[0].wait(60)
    for expert, layer in ((1, 0), (2, 1)):
        held.ask(expert, When.NOW, layer)
    held.let(0, 1)
    assert held.next() == [0, 1], "not when the first one was there, and not only with that of another layer"
