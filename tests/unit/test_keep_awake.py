"""Cores are kept busy exactly while they are held, by threads that everybody else may push aside."""

import os
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from shared.keep_awake import BusyCores
from shared.priority import has_quota

PATIENCE_S = 30.0


@pytest.fixture
def awake() -> Iterator[BusyCores]:
    cores = BusyCores(sorted(os.sched_getaffinity(0))[:1])
    yield cores
    cores.close()


@pytest.mark.parametrize(
    ("file", "text", "expected"),
    [
        ("cpu.max", "max 100000", False),
        ("cpu.max", "200000 100000", True),
        ("cpu/cpu.cfs_quota_us", "-1", False),
        ("cpu/cpu.cfs_quota_us", "50000", True),
        ("other", "", False),
    ],
)
def test_a_quota_is_found_in_both_forms_of_cgroups(tmp_path: Path, file: str, text: str, expected: bool):
    (tmp_path / "cpu").mkdir()
    (tmp_path / file).write_text(text + "\n")
    assert has_quota(tmp_path) is expected


def keeper() -> threading.Thread:
    (thread,) = [thread for thread in threading.enumerate() if thread.name.startswith("keep-awake")]
    return thread


def state(thread: threading.Thread) -> str:
    """R for running, S for sleeping."""
    stat = Path(f"/proc/self/task/{thread.native_id}/stat").read_text()
    return stat.rpartition(")")[2].split()[0]


def until(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < end, "nothing changed"
        time.sleep(0.01)


def test_it_runs_while_held_and_sleeps_when_released(awake: BusyCores):
    for _ in range(2):
        until(lambda: state(keeper()) == "S")
        awake.hold()
        awake.hold()
        until(lambda: state(keeper()) == "R")
        awake.release()
        until(lambda: state(keeper()) == "S")


def test_it_has_the_lowest_priority_and_stays_on_its_core(awake: BusyCores):
    awake.hold()
    number = keeper().native_id
    assert number is not None
    until(lambda: os.sched_getscheduler(number) == os.SCHED_IDLE)
    assert os.sched_getaffinity(number) == {min(os.sched_getaffinity(0))}


@pytest.mark.parametrize("held", [False, True])
def test_closing_ends_the_threads(held: bool):
    cores = BusyCores([min(os.sched_getaffinity(0))])
    thread = keeper()
    if held:
        cores.hold()
    cores.close()
    assert not thread.is_alive()
