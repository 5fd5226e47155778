"""How well are times per token predicted, for batches and contexts that the fit has not seen?

    python bench/predicted.py --model DIR [--experts 1,2] --json

`moemesh profile` measures meshes on this machine and fits the performance model to them; other batches and contexts are
measured in the same meshes and compared with what the fit says of them. a_max comes from routing that the first mesh
recorded meanwhile.
"""

import argparse
import asyncio
import random
import tempfile
from pathlib import Path
from typing import Any

from common import Bar, median, report

from shared.cli.profile import a_max, show
from shared.cli.profiling import Shape, measure
from shared.models.source import open_source
from shared.planning.fit import errors, fit
from shared.planning.routing import recorded

FITTED = [(batch, context) for batch in (1, 2, 4, 8, 16, 32) for context in (64, 512)]
HELD_OUT = [(1, 250), (3, 100), (6, 400), (12, 64), (12, 300), (24, 200)]
MOST_MEDIAN, MOST_WORST = 0.10, 0.25


async def run(args: argparse.Namespace, trace: Path) -> tuple[dict[str, Any], list[Bar]]:
    spec = open_source(args.model).spec
    instances = [int(n) for n in args.experts.split(",")]
    shapes = [Shape(n, b, c) for n in instances for b, c in FITTED + HELD_OUT]
    random.Random(0).shuffle(shapes)  # what the machine does meanwhile must not look like a difference of shapes
    points = await measure(args.model, shapes, {}, spec.vocab_size, trace)
    routing = recorded(trace, spec.router.experts, spec.router.top_k)
    held = [p for p in points if (p.batch, int(p.context)) in HELD_OUT]
    seen = [p for p in points if (p.batch, int(p.context)) in FITTED]
    fitted = fit(seen, len(spec.layers), len(spec.moe_layers), spec.router.top_k)
    for some in (seen, held):
        show(some, errors(fitted, some, a_max(routing, some)))
    off = [abs(error) for error in errors(fitted, held, a_max(routing, held))]
    result = {"model": args.model, "fitted": vars(fitted), "held_out": [vars(p) for p in held], "errors": off}
    return result, [
        Bar(f"error of predicted time per token, median of {len(held)}", median(off), MOST_MEDIAN, True),
        Bar("worst error of a predicted time per token", max(off), MOST_WORST, True),
    ]


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--model", required=True, help="checkpoint directory (moemesh models make --preset bench-1b)")
    p.add_argument("--experts", default="1,2", help="numbers of expert instances")
    p.add_argument("--json", action="store_true", help="accepted for symmetry: the last line is always JSON")
    args = p.parse_args()
    with tempfile.TemporaryDirectory(prefix="moemesh-predicted-") as scratch:
        report("predicted", *asyncio.run(run(args, Path(scratch) / "routing.trace")))


if __name__ == "__main__":
    main()
