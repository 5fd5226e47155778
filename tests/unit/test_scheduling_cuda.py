"""The Triton kernel chooses as the CPU's does: on a GPU where there is one, else in Triton's interpreter."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read when Triton is imported
pytest.importorskip("triton")

from hypothesis import given, settings
from hypothesis import strategies as st

from shared.activation import schedule_activations
from shared.scheduling.cuda import schedule_on_device
from shared.scheduling.kernels import BAD_ID, DONE
from tests.unit.exchanges import exchanges

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def on_device(ids: np.ndarray, homes: np.ndarray, live: int) -> tuple[np.ndarray, np.ndarray, int]:
    masks = torch.from_numpy(homes.view(np.int64)).to(DEVICE)
    schedule = schedule_on_device(torch.from_numpy(ids).to(DEVICE), masks, live)
    replicas, activated, status = (tensor.cpu().numpy() for tensor in schedule)
    return replicas, activated, int(status[0])


def assert_alike(ids: np.ndarray, homes: np.ndarray, live: int) -> None:
    expected = schedule_activations(ids, homes, live)
    replicas, activated, status = on_device(ids, homes, live)
    assert status == DONE
    assert np.array_equal(replicas, expected.replicas)
    assert activated[: live.bit_length()].tolist() == expected.activated.tolist()
    assert not activated[live.bit_length() :].any()


@settings(deadline=None, max_examples=25)
@given(exchanges())
def test_small_exchanges_are_scheduled_alike(exchange):
    assert_alike(*exchange)


@settings(deadline=None, max_examples=4)
@given(st.integers(0, 2**32), st.sampled_from([16, 64]))
def test_large_ones_where_chains_of_moves_are_needed_too(seed, instances):
    rng = np.random.default_rng(seed)
    experts = 3 * instances
    homes = np.zeros(experts, np.uint64)
    for e in range(experts):
        for i in rng.choice(instances, 1 + min(rng.poisson(1.5), instances - 1), replace=False):
            homes[e] |= np.uint64(1 << int(i))
    ids = np.argsort(rng.random((40, experts)), axis=1)[:, :4].astype(np.int32)
    assert_alike(ids, homes, (1 << instances) - 1)


def test_ids_outside_the_layer_and_experts_without_a_home_are_reported():
    homes = np.array([1, 2, 1, 2], np.uint64)
    assert on_device(np.array([[0, 4]], np.int32), homes, 0b11)[2] == BAD_ID
    assert on_device(np.array([[0, -1]], np.int32), homes, 0b11)[2] == BAD_ID
    assert on_device(np.array([[2, 3], [0, 1]], np.int32), homes, 0b01)[2] == 1


def test_no_rows_activate_nothing():
    replicas, activated, status = on_device(np.empty((0, 2), np.int32), np.ones(4, np.uint64), 0b1)
    assert replicas.shape == (0, 2) and not activated.any() and status == DONE


COMPILE = """
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, compile
from shared.scheduling.cuda import _balance

types = {"marks": "*i32", "homes": "*i64", "live": "i64", "chosen_out": "*i32", "activated": "*i32", "status": "*i32"}
sizes = {"size": 256, "instances": 64}
source = ASTSource(_balance, {**types, "experts": "i32", **dict.fromkeys(sizes, "constexpr")}, sizes)
print(len(compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": 1}).asm["cubin"]))
"""


def test_the_choice_compiles_for_a_gpu_that_is_not_here(tmp_path):
    """The interpreter is more lenient than the compiler, which wants one type per variable of a loop."""
    environ = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environ |= {"TRITON_CACHE_DIR": str(tmp_path), "PYTHONPATH": str(Path(__file__).parents[2])}
    done = subprocess.run([sys.executable, "-c", COMPILE], env=environ, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and int(done.stdout) > 0, done.stderr
