"""Replica choice needs no coordination: every process chooses the same, whatever its threads."""

import os
import subprocess
import sys

EXCHANGES, THREADS, LIMIT_S = 10_000, (1, 3), 240


def start(threads: int) -> subprocess.Popen[str]:
    counts = dict.fromkeys(("NUMBA_NUM_THREADS", "OMP_NUM_THREADS"), str(threads))
    command = [sys.executable, "-m", "tests.seeded_choices", str(threads), str(EXCHANGES)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=os.environ | counts)


def test_processes_with_different_thread_counts_choose_the_same_replicas_from_hidden_states() -> None:
    processes = [start(threads) for threads in THREADS]
    try:
        outputs = [process.communicate(timeout=LIMIT_S)[0].split() for process in processes]
    finally:
        for process in processes:
            process.kill()
            process.wait()
    assert [process.returncode for process in processes] == [0] * len(THREADS)
    assert len(set(outputs[0])) == EXCHANGES // 1000
    assert outputs[1:] == outputs[:-1]
