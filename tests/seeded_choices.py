"""Gates seeded hidden states and chooses replicas, exchange after exchange, and prints what came of it as digests.

    python -m tests.seeded_choices THREADS EXCHANGES

Run by tests/integration/test_same_choice.py as processes of their own. Every exchange is a function of its number:
rows, router, homes, live mask and policy. Scores are tied on purpose: experts that share a row of the router, rows of
zeros.
"""

import hashlib
import sys
from functools import cache

import numpy as np
import torch

from shared.activation import Choice, NoLiveHome, plan_exchange
from shared.kernels.cpu import CpuKernels
from shared.models.spec import RouterSpec
from shared.scheduling.policies import Policy

ROWS, SIZES, HIDDEN, INSTANCES = (1, 2, 5, 16, 64), (8, 32, 160), (32, 256), 12
EACH = 1000
"""Exchanges of one digest."""


@cache
def router(experts: int, hidden: int) -> torch.Tensor:
    """fp32 [experts, hidden]; every fourth expert scores as the one before it."""
    matrix = np.random.default_rng(experts + hidden).standard_normal((experts, hidden)).astype(np.float32)
    matrix[3::4] = matrix[2::4]
    return torch.from_numpy(matrix)


def exchange(kernels: CpuKernels, number: int) -> bytes:
    """Ids, weights, and the plan of one instance with the digest of all choices."""
    rng = np.random.default_rng(number)
    experts, hidden, rows = (
        options[i] for options, i in zip((SIZES, HIDDEN, ROWS), rng.integers(0, (3, 2, 5)), strict=True)
    )
    x = rng.standard_normal((rows, hidden)).astype(np.float32)
    x[rng.random(rows) < 0.1] = 0
    spec = RouterSpec(experts, top_k=int(rng.integers(1, 9)), score=("softmax", "sigmoid")[number % 2])
    weights, ids = (tensor.numpy() for tensor in kernels.route(torch.from_numpy(x), router(experts, hidden), spec))
    homes = (rng.integers(1, 1 << INSTANCES, experts) & rng.integers(1, 1 << INSTANCES, experts)).astype(np.uint64)
    homes |= np.uint64(1) << rng.integers(0, INSTANCES, experts).astype(np.uint64)
    dead = 1 << int(rng.integers(0, INSTANCES)) if number % 5 == 0 else 0
    live, instance = ((1 << INSTANCES) - 1) & ~dead, int(rng.integers(0, INSTANCES))
    try:
        parts, digest = plan_exchange(ids, weights, Choice(homes, live, instance, list(Policy)[number % len(Policy)]))
    except NoLiveHome as error:
        return ids.tobytes() + weights.tobytes() + str(error).encode()
    return b"".join(array.tobytes() for array in (ids, weights, *parts)) + digest.to_bytes(8, "little")


def main(threads: int, count: int) -> None:
    kernels = CpuKernels(threads)
    assert kernels.threads == threads
    for first in range(0, count, EACH):
        done = (exchange(kernels, number) for number in range(first, first + EACH))
        print(hashlib.blake2b(b"".join(done), digest_size=16).hexdigest())


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]))
