"""Run every bench that has bars and print one table; exits 1 when a bar does not hold or a bench ends with an error.

Needs about an hour and nothing else running. The benches' checkpoint is made in a temporary directory. Arguments
go to peers.py, which measures only the servers that it is given: --vllm PYTHON, --llama-server BINARY --gguf FILE;
but for --heldout DIR, the text for predictor.py and elastic.py, and what stands behind --replay, which goes to
replay.py: they measure nothing without held-out text and traces.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

BENCH = Path(__file__).parent
SCRIPTS = (
    "decode.py", "limit.py", "groups.py", "ablation.py", "prefill.py", "pauses.py", "monolith.py", "ping_pong.py",
    "idle.py", "memory.py", "switch.py", "predicted.py",
)  # fmt: skip
PURE = ("activation.py", "autoscale.py", "planning.py", "rebalance.py", "simulation.py")
"""Those that need no model, or bring their own."""
AS_ROOT = ("exchange.py",)
"""Those that make simulated nodes; left out where they cannot."""
STEAL = 7


def run(script: str, *args: str) -> dict[str, Any]:
    """Run one bench and return the JSON of its last line; where it ends with an error, a bar that does not hold.

    Adds ``stolen``: the share of the cores' time that the host of a virtual machine gave to others meanwhile.
    """
    print(f"== {script} {' '.join(args)}", flush=True)
    before = core_times()
    done = subprocess.run([sys.executable, BENCH / script, *args], stdout=subprocess.PIPE, text=True)
    print(done.stdout, end="", flush=True)
    spent = [after - start for after, start in zip(core_times(), before, strict=True)]
    status = {"name": "exit status", "value": done.returncode, "bar": 0, "at_most": True, "ok": False}
    result = {"bench": script, "bars": [status]} if done.returncode else json.loads(done.stdout.splitlines()[-1])
    return {**result, "stolen": spent[STEAL] / max(1, sum(spent))}


def core_times() -> list[int]:
    """Ticks of all cores since the start of the system: user, nice, system, idle, iowait, irq, softirq, steal."""
    return [int(word) for word in Path("/proc/stat").read_text().split()[1:9]]


def all_bars(scratch: Path, peers: list[str], heldout: list[str], replay: list[str]) -> list[dict[str, Any]]:
    """The bars of every bench, each with its bench's name; the rest: arguments of those that need data or servers."""
    from shared.models.presets import make_checkpoint

    model = scratch / "bench-1b"
    make_checkpoint("bench-1b", model)
    results = [run("peers.py", "--model", str(model), "--json", *peers)]
    results += [run(script, "--model", str(model), "--json") for script in SCRIPTS]
    results += [run(script) for script in (*PURE, *(AS_ROOT if os.geteuid() == 0 else ()))]
    results += [run(script, *heldout) for script in ("predictor.py", "elastic.py")]
    results.append(run("replay.py", *replay))
    return [
        {"bench": result["bench"], "stolen": result["stolen"], **bar} for result in results for bar in result["bars"]
    ]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--heldout", default="", help="directory of texts, for predictor.py and elastic.py")
    parser.add_argument("--replay", nargs=argparse.REMAINDER, default=[], help="everything behind it is replay.py's")
    args, peers = parser.parse_known_args()
    with tempfile.TemporaryDirectory(prefix="moemesh-bars-") as scratch:
        bars = all_bars(Path(scratch), peers, ["--heldout", args.heldout] if args.heldout else [], args.replay)
    table = Table("bench", "measure", "value", "bar", "ok", "stolen")
    for bar in bars:
        sign = "<=" if bar["at_most"] else ">="
        table.add_row(
            bar["bench"],
            bar["name"],
            f"{bar['value']:.3g}",
            f"{sign} {bar['bar']:g}",
            "yes" if bar["ok"] else "NO",
            f"{bar['stolen']:.0%}",
        )
    Console().print(table)
    return 0 if all(bar["ok"] for bar in bars) else 1


if __name__ == "__main__":
    sys.exit(main())
