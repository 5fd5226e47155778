"""How fast are the CPU kernels? GB/s of weights (or cache) read, GFLOP/s, and microseconds per call.

    python bench/kernels.py [--threads 2] [--rows 1,4,32,512] [--hidden 1024] [--inner 512] [--experts 32]

Each figure is the best of several runs, weights cold enough to come from memory. The last line is one JSON object.
"""

import argparse
import json
import os
import time
from collections.abc import Callable, Iterator
from typing import Any

from shared.kernels.threads import thread_environment

RUN_S = 0.1
RUNS = 5
ROTATION_BYTES = 256 << 20
"""Weights are taken in turn from copies of this size together, so that they do not stay in the caches."""
FP8_BLOCK = 128
HEADS, KV_HEADS, HEAD_DIM, CONTEXT = 16, 4, 64, 512
MOST_SEQUENCES = 64
"""Attention over blocks in random order is measured for so many."""


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--rows", default="1,4,32,512", help="rows per call, comma-separated")
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--inner", type=int, default=512, help="hidden size of an expert")
    parser.add_argument("--experts", type=int, default=32, help="experts of the layer; each row uses four")
    return parser.parse_args()


def seconds(call: Callable[[int], object]) -> float:
    """Best time of one call; ``call`` gets its number."""
    call(0)
    best, number = float("inf"), 0
    for _ in range(RUNS):
        start, done = time.perf_counter(), 0
        while time.perf_counter() - start < RUN_S or not done:
            call(number)
            number, done = number + 1, done + 1
        best = min(best, (time.perf_counter() - start) / done)
    return best


def forms() -> dict[str, Callable[[Any], Any]]:
    """Suffix of a kernel's name -> how a matrix is stored for it; every call makes a copy."""
    import torch

    from shared.kernels.weights import Fp8Blocks

    def fp8(matrix: torch.Tensor) -> Fp8Blocks:
        factors = torch.full([-(-size // FP8_BLOCK) for size in matrix.shape], 0.01)
        return Fp8Blocks((matrix * 100).to(torch.float8_e4m3fn), factors, (FP8_BLOCK, FP8_BLOCK))

    return {"": lambda matrix: matrix.bfloat16(), " fp8": fp8, " fp32": lambda matrix: matrix.float().clone()}


def products(
    kernels: Any, args: argparse.Namespace, rows: int, suffix: str, form: Callable[[Any], Any]
) -> Iterator[tuple[str, Callable[[int], object], float, float]]:
    """Cases of ``cases`` that read weights, stored in one form."""
    import torch

    hidden, x = args.hidden, torch.randn(rows, args.hidden)
    one = torch.randn(hidden, hidden)
    square = [form(one) for _ in range(max(1, ROTATION_BYTES // form(one).nbytes))]
    out, work = torch.empty(rows, hidden), 2.0 * rows * hidden * hidden
    yield f"linear{suffix}", lambda i: kernels.linear(x, square[i % len(square)], out=out), square[0].nbytes, work

    ids = torch.stack([torch.randperm(args.experts)[:4] for _ in range(rows)]).flatten().int().sort()
    tokens = (ids.indices // 4).int()
    sizes = ((args.inner, hidden), (args.inner, hidden), (hidden, args.inner))
    matrices = [torch.randn(size) for size in sizes]
    tables = [kernels.expert_table({e: [form(m) for m in matrices] for e in range(args.experts)}) for _ in range(8)]
    parts, used, area = torch.empty(4 * rows, hidden), len(ids.values.unique()), 3.0 * hidden * args.inner

    def feed_forward(i: int) -> object:
        return kernels.experts(x, tables[i % len(tables)], tokens, ids.values, "silu", parts)

    yield f"experts{suffix}", feed_forward, tables[0].nbytes / args.experts * used, 2.0 * 4 * rows * area


def scattered(kernels: Any, rows: int) -> tuple[str, Callable[[int], object], float, float]:
    """A case of ``cases``: rows of as many sequences, whose blocks lie in random order."""
    import torch

    from shared.kernels.base import Paged, Visibility

    blocks = rows * CONTEXT // 16
    shape = blocks, 16, KV_HEADS, HEAD_DIM
    read = 2.0 * rows * CONTEXT * KV_HEADS * HEAD_DIM * 4
    caches = [(torch.randn(shape), torch.randn(shape)) for _ in range(max(1, int(ROTATION_BYTES // read)))]
    tables, one = torch.randperm(blocks).view(rows, -1).int(), torch.ones(rows, dtype=torch.int32)
    at = Paged(tables, torch.arange(rows).int(), (CONTEXT - 1) * one)
    q, mixed = torch.randn(rows, HEADS, HEAD_DIM), torch.empty(rows, HEADS * HEAD_DIM)

    def attend(i: int) -> object:
        return kernels.attention(q, caches[i % len(caches)], at, Visibility(0.125), mixed)

    return "scattered", attend, read, 4.0 * rows * CONTEXT * HEADS * HEAD_DIM


def cases(
    kernels: Any, args: argparse.Namespace, rows: int
) -> Iterator[tuple[str, Callable[[int], object], float, float]]:
    """(name, call, bytes read, floating-point operations) of each kernel for a number of rows."""
    import torch

    from shared.kernels.base import Paged, Visibility

    for suffix, form in forms().items():
        yield from products(kernels, args, rows, suffix, form)

    q, blocks = torch.randn(rows, HEADS, HEAD_DIM), (CONTEXT + rows + 15) // 16
    cache = torch.randn(blocks, 16, KV_HEADS, HEAD_DIM)
    table, one = torch.arange(blocks).view(1, -1).int(), torch.zeros(rows, dtype=torch.int32)
    positions = torch.arange(CONTEXT, CONTEXT + rows).int()
    seen = float((positions + 1).sum())

    at, mixed = Paged(table, one, positions), torch.empty(rows, HEADS * HEAD_DIM)

    def attend(_: int) -> object:
        return kernels.attention(q, (cache, cache), at, Visibility(0.125), mixed)

    yield "attention", attend, 2.0 * seen * KV_HEADS * HEAD_DIM * 4, 4.0 * seen * HEADS * HEAD_DIM
    if rows <= MOST_SEQUENCES:
        yield scattered(kernels, rows)

    x, norm = torch.randn(rows, args.hidden), torch.ones(args.hidden)
    out = torch.empty_like(x)
    yield "rms_norm", lambda _: kernels.rms_norm(x, norm, 1e-6, out=out), 8.0 * x.numel(), 4.0 * x.numel()


def main() -> None:
    args = parse()
    os.environ.update(thread_environment(args.threads, os.environ))
    from shared.kernels.cpu import CpuKernels  # numba and torch read the environment when they are imported

    start = time.perf_counter()
    kernels = CpuKernels(args.threads)
    result: dict[str, Any] = {
        "threads": kernels.threads,
        "compile_s": round(time.perf_counter() - start, 2),
        "kernels": [],
    }
    for rows in map(int, args.rows.split(",")):
        for name, call, read, work in cases(kernels, args, rows):
            took = seconds(call)
            line = {
                "kernel": name,
                "rows": rows,
                "us": took * 1e6,
                "gb_s": read / took / 1e9,
                "gflop_s": work / took / 1e9,
            }
            result["kernels"].append({k: round(v, 1) if isinstance(v, float) else v for k, v in line.items()})
            rates = f"{line['gb_s']:7.1f} GB/s {line['gflop_s']:7.1f} GFLOP/s"
            print(f"{name:>12} {rows:>5} rows {line['us']:10.1f} us {rates}")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
