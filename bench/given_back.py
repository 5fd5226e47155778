"""How fast is memory in use again that a process gave back to the system, so long after?

    python bench/given_back.py [--mib 512] [--silences 0,0.5,1,2,3,5] --json

No service runs: this is what a start after a silence cannot be faster than (bench/elastic.py), for experts that are
stopped give their memory back. A virtual machine with free page reporting hands it on to its host a moment later, and
must be given it again, page by page.
"""

import argparse
import mmap
import time

from common import median, report

TURNS = 3


def touched(mib: int, silence: float) -> float:
    """GB/s at which memory that was given back ``silence`` seconds ago is provided again."""
    size = mib << 20
    with mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as memory:
        memory.madvise(mmap.MADV_HUGEPAGE)  # as the slots of experts
        _touch(memory)
        memory.madvise(mmap.MADV_DONTNEED)
        time.sleep(silence)
        start = time.perf_counter()
        _touch(memory)
        return size / (time.perf_counter() - start) / 1e9


def _touch(memory: mmap.mmap) -> None:
    memory[:: mmap.PAGESIZE] = bytes(len(memory) // mmap.PAGESIZE)


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--mib", type=int, default=512, help="memory")
    p.add_argument("--silences", default="0,0.5,1,2,3,5", help="seconds, comma-separated")
    p.add_argument("--json", action="store_true", help="accepted for symmetry: the last line is always JSON")
    args = p.parse_args()
    rates = {}
    for silence in map(float, args.silences.split(",")):
        rates[f"{silence:g}"] = round(median([touched(args.mib, silence) for _ in range(TURNS)]), 2)
        print(f"given back {silence:g} s ago: {rates[f'{silence:g}']} GB/s", flush=True)
    report("given_back", {"gb_s": rates}, [])


if __name__ == "__main__":
    main()
