"""How well are times per token predicted, for batches and contexts that the fit has not seen?

    python bench/predicted.py --model DIR [--only paced] --json

Two sets, each with a fit of its own, as `moemesh profile` makes it: meshes of a checkpoint at this machine's own speed
(1A1E and 1A2E), and paced meshes of up to 4A8E, in which the embedded model keeps the times of a synthetic profile
(docs/operations.md). Other batches and contexts are measured in the same meshes, in mixed order, and compared with what
the model says of them. a_max comes from routing that the first mesh of each set recorded meanwhile.
"""

import argparse
import asyncio
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common import Bar, median, report

from shared.cli.owned import owned_directory
from shared.cli.profile import show, tables_of
from shared.cli.profiling import PACED, Effort, Shape, measure, with_a_max
from shared.models.source import open_source
from shared.planning.fit import fit
from shared.planning.here import predicted
from shared.planning.sizes import sizes_of

MOST_MEDIAN, MOST_WORST = 0.10, 0.25
Mesh = tuple[int, int]
Work = tuple[int, int]


@dataclass(frozen=True)
class Set:
    """Meshes (attention, experts), and (batch, context) of what the fit sees and of what it does not see."""

    meshes: tuple[Mesh, ...]
    fitted: tuple[Work, ...]
    held_out: tuple[Work, ...]
    effort: Effort
    pace: str = ""

    def shapes(self) -> list[Shape]:
        """In mixed order."""
        every = [Shape(a, e, b, c) for a, e in self.meshes for b, c in self.fitted + self.held_out]
        return random.Random(0).sample(every, len(every))


SETS = {
    "unpaced": Set(
        ((1, 1), (1, 2)),
        ((1, 64), (2, 64), (4, 64), (8, 64), (16, 64), (32, 64), (8, 320)),
        ((1, 250), (3, 100), (6, 240), (12, 100), (24, 64)),
        Effort(output=64, repeats=5),
    ),
    "paced": Set(
        ((1, 1), (1, 4), (2, 4), (4, 8)),
        ((4, 64), (16, 64), (48, 64), (8, 192), (32, 192)),
        ((6, 100), (12, 150), (24, 64), (40, 128)),
        PACED,
        pace="synthetic-10ms",
    ),
}


async def run(model: str, chosen: Set, trace: Path) -> tuple[dict[str, Any], list[float]]:
    """What was measured and predicted, and the errors for what was held out, as shares."""
    source = open_source(model)
    sizes = sizes_of(source.spec, source.name)
    vocab = source.spec.vocab_size
    measured = await measure(model, chosen.shapes(), chosen.effort, vocab, trace, chosen.pace)
    tables = tables_of(trace, sizes, measured)
    points = with_a_max(measured, tables)
    seen, held = ([p for p in points if (p.batch, int(p.context)) in work] for work in (chosen.fitted, chosen.held_out))
    fitted = fit(seen, sizes, chosen.pace)
    told = predicted(fitted, tables, held)
    show(seen, predicted(fitted, tables, seen))
    show(held, told)
    rows = [{**vars(point), "predicted_s": seconds} for point, seconds in zip(held, told, strict=True)]
    facts = {"model": source.name, "pace": chosen.pace, "held_out": rows, "seen": [vars(point) for point in seen]}
    return facts, [abs(row["predicted_s"] / row["step_s"] - 1) for row in rows]


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--model", required=True, help="checkpoint directory (moemesh models make --preset bench-1b)")
    p.add_argument("--only", choices=SETS, help="one of the sets")
    p.add_argument("--json", action="store_true", help="accepted for symmetry: the last line is always JSON")
    args = p.parse_args()
    result: dict[str, Any] = {}
    bars = []
    for name in [args.only] if args.only else SETS:
        with owned_directory("moemesh-bench-") as scratch:
            model = "" if SETS[name].pace else args.model
            result[name], off = asyncio.run(run(model, SETS[name], scratch / "routing.trace"))
        bars += [
            Bar(f"{name}: error of predicted time per token, median of {len(off)}", median(off), MOST_MEDIAN, True),
            Bar(f"{name}: worst error of a predicted time per token", max(off), MOST_WORST, True),
        ]
    report("predicted", result, bars)


if __name__ == "__main__":
    main()
