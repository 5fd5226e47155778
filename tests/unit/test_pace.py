"""A paced instance waits for exactly the time that its profile gives, behind work that is done. No real clock."""

import numpy as np
import pytest
import torch

from shared.device_profile import DeviceProfile, attention_seconds, experts_seconds
from shared.pace import UNPACED, Pacer, Unpaced
from tests.unit.toy_engine import ToyEngine

PROFILE = DeviceProfile(
    "test", attention_row_s=0.01, attention_position_s=0.001, shared_s=0.002, experts_s=0.1, expert_s=0.01, head_s=0.5
)


class Clock:
    """Time that passes when somebody waits for it, and a little longer."""

    overshoot = 0.0

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now

    def wait_until(self, moment: float) -> None:
        self.now = max(self.now, moment + self.overshoot)


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def pacer(clock: Clock) -> Pacer:
    return Pacer(PROFILE, clock.wait_until, clock)


def test_what_was_computed_faster_is_waited_for_from_its_beginning(clock: Clock, pacer: Pacer):
    clock.now += 0.001  # real work
    pacer.shared(100.0, rows=5)
    assert clock.now == pytest.approx(100.002)
    pacer.head(clock.now, rows=1)
    assert clock.now == pytest.approx(100.502)
    assert pacer.modelled == pytest.approx(0.502)
    assert pacer.late == pytest.approx(0.0)


def test_what_was_computed_too_slowly_is_not_waited_for_and_counted(clock: Clock, pacer: Pacer):
    clock.now += 0.7
    pacer.head(100.0, rows=1)
    assert clock.now == 100.7
    assert pacer.modelled == pytest.approx(0.5)
    assert pacer.late == pytest.approx(0.2)


def test_a_wait_that_ends_too_late_is_counted(clock: Clock, pacer: Pacer):
    clock.overshoot = 0.003
    pacer.head(100.0, rows=1)
    assert pacer.late == pytest.approx(0.003)


def test_attention_counts_the_positions_that_each_row_attends_to(clock: Clock, pacer: Pacer):
    pacer.attention(100.0, torch.tensor([0, 1, 2, 9], dtype=torch.int32))
    assert clock.now == pytest.approx(100 + attention_seconds(PROFILE, 4, (1 + 2 + 3 + 10) / 4))


def test_experts_count_once_however_many_parts_they_compute(clock: Clock, pacer: Pacer):
    pacer.experts(100.0, np.array([2, 2, 2, 5, 7, 7], np.int32))
    assert clock.now == pytest.approx(100 + experts_seconds(PROFILE, 3))


def test_work_without_a_time_in_the_profile_takes_its_own(clock: Clock):
    pacer = Pacer(DeviceProfile("link only", link_latency_s=0.005), clock.wait_until, clock)
    clock.now += 0.1
    pacer.attention(100.0, torch.tensor([3], dtype=torch.int32))
    pacer.shared(100.0, 1)
    pacer.head(100.0, 1)
    pacer.experts(100.0, np.array([1], np.int32))
    assert clock.now == 100.1
    assert (pacer.modelled, pacer.late) == (0.0, 0.0)


class Recorder(Unpaced):
    """Writes down what the engine paces."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, int]] = []

    def attention(self, began: float, positions: torch.Tensor) -> None:
        self.calls.append(("attention", len(positions)))

    def shared(self, began: float, rows: int) -> None:
        self.calls.append(("shared", rows))

    def head(self, began: float, rows: int) -> None:
        self.calls.append(("head", rows))


def test_a_step_paces_each_layer_of_each_micro_batch_once_and_the_head_once():
    whole, split = Recorder(), Recorder()
    ToyEngine(pace=whole).run("x", [1, 2, 3, 4, 5], max_tokens=1)
    ToyEngine(pace=split, micro_batches=2).run("x", [1, 2, 3, 4, 5], max_tokens=1)
    assert sorted(whole.calls) == [("attention", 5)] * 3 + [("head", 1)] + [("shared", 5)] * 2
    assert sorted(split.calls) == sorted(
        [("attention", 2), ("attention", 3)] * 3 + [("shared", 2), ("shared", 3)] * 2 + [("head", 1)]
    )


def test_metrics_say_paced_and_by_what_and_an_unpaced_instance_says_nothing(pacer: Pacer):
    pacer.shared(100.0, rows=5)
    samples = {sample.name: sample for sample in pacer.samples()}
    assert dict(samples["paced"].labels) == {"profile": "test"}
    assert samples["paced_seconds"].value == pytest.approx(0.002)
    assert list(UNPACED.samples()) == []
