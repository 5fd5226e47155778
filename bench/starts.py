"""What does the start of an expert cost, and how much does it slow its instance's computation down meanwhile?

    python bench/starts.py --model DIR [--small DIR] [--repeats 9]

Starts as an expert instance makes them (services/experts/starts.py), one after the other, into slots that have been
used before: warm ones from the page cache, cold ones after it has been dropped. Two checkpoints with experts of
different sizes (``--small``: the embedded one by default) tell the time of a start apart from that of its bytes. The
compute thread calls a layer's experts again and again, alone and while starts go on, on the same core and on another
one. Best of interleaved repeats: other work on the machine only adds. The last line is one JSON object.
"""

import argparse
import os
import random
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from common import report
from premise import calls

from shared.kernels.threads import thread_environment

if TYPE_CHECKING:
    from shared.kernels.weights import Weight
    from shared.models.loader import Checkpoint

STARTS, SLOTS = 48, 24
"""Starts in a row, over so many slots."""


def parse() -> argparse.Namespace:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--model", required=True, help="checkpoint directory (moemesh models make --preset bench-1b)")
    p.add_argument("--small", default="", help="another one with smaller experts")
    p.add_argument("--repeats", type=int, default=9)
    return p.parse_args()


class Starter:
    """Makes starts from a checkpoint and waits for them."""

    def __init__(self, model: str) -> None:
        import torch

        from services.experts.starts import Starts
        from shared.models.loader import Checkpoint, open_checkpoint
        from shared.models.moe import expert_weights
        from shared.models.slots import HostSlots, tensors_of

        opened = open_checkpoint(model)

        def read(checkpoint: "Checkpoint", layer: int, expert: int) -> "tuple[Weight, ...]":
            return expert_weights(checkpoint, layer, expert, torch.device("cpu"), torch.float32)

        self.spec, like = opened.spec, read(opened, opened.spec.moe_layers[0], 0)
        self.files, self.bytes = list(opened.path.glob("*.safetensors")), sum(t.nbytes for t in tensors_of(like))
        self._woken = threading.Semaphore(0)
        slots = HostSlots(SLOTS, like)
        self._starts = Starts(partial(Checkpoint, opened.source), read, slots, self._woken.release)
        self.run(0)

    def run(self, seed: int) -> float:
        """Seconds of a start, mean of several experts drawn from all layers. Raises RuntimeError for one that fails."""
        from services.experts.starts import When

        rng = random.Random(seed)
        experts = [(layer, e) for layer in self.spec.moe_layers for e in range(self.spec.router.experts)]
        for number, (layer, expert) in enumerate(rng.sample(experts, STARTS)):
            self._starts.ask(layer, expert, number % SLOTS, When.NOW)
        begun, ended = time.perf_counter(), self._starts.ended()
        while len(ended) < STARTS:  # one wake may stand for several of a layer
            self._woken.acquire()
            ended += self._starts.ended()
        taken = (time.perf_counter() - begun) / STARTS
        if problems := [started.problem for started in ended if started.problem]:
            raise RuntimeError(problems[0])
        return taken

    def drop(self) -> None:
        """The checkpoint leaves the page cache, as far as nobody maps it."""
        for file in self.files:
            with file.open("rb") as opened:
                os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def best(measure: Callable[[int], float], repeats: int) -> float:
    return min(measure(seed) for seed in range(repeats))


def cold(starter: Starter, seed: int) -> float:
    starter.drop()
    return starter.run(seed)


def slowed(starter: Starter, compute: Callable[[int, int, random.Random], Callable[[], None]], repeats: int) -> float:
    """What an instance loses of its time while it starts experts: seconds of computation per second of a start."""
    call, shares = compute(8, 1, random.Random(0)), []
    alone = best(lambda _: timed(call), 20 * repeats)
    start = best(starter.run, repeats)
    for seed in range(repeats):
        done, thread = 0, threading.Thread(target=starter.run, args=(seed,))
        begun = time.perf_counter()
        thread.start()
        while thread.is_alive():
            call()
            done += 1
        shares.append((time.perf_counter() - begun - done * alone) / (STARTS * start))
        thread.join()
    return min(shares)


def timed(call: Callable[[], None]) -> float:
    begun = time.perf_counter()
    call()
    return time.perf_counter() - begun


def main() -> None:
    args = parse()
    os.environ.update(thread_environment(1, os.environ))
    large, small = Starter(args.model), Starter(args.small)
    warm, little = best(large.run, args.repeats), best(small.run, args.repeats)
    rate = (large.bytes - small.bytes) / (warm - little)
    frozen = best(partial(cold, large), args.repeats)
    compute, cores = calls(args.model, 1), sorted(os.sched_getaffinity(0))
    result = {"expert_bytes": large.bytes, "warm_s": warm, "small_bytes": small.bytes, "small_warm_s": little}
    result |= {"start_s": little - small.bytes / rate, "warm_bytes_per_s": rate}
    result |= {"cold_s": frozen, "cold_bytes_per_s": large.bytes / (frozen - result["start_s"])}
    result["start_share, another core"] = slowed(large, compute, args.repeats)
    for task in Path("/proc/self/task").iterdir():
        os.sched_setaffinity(int(task.name), cores[:1])
    result["start_share, the same core"] = slowed(large, compute, args.repeats)
    for name, value in result.items():
        print(f"{name:>28}  {value:.4g}", flush=True)
    report("starts", {"model": args.model, **result})


if __name__ == "__main__":
    main()
