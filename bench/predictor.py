"""How well are the loads of later layers predicted, beside the baselines, and what does a prediction cost?

    python bench/predictor.py --heldout DIR [--model DIR] [--predictor DIR]

DIR has texts (*.txt) that neither the model nor its predictors were trained on; by default the embedded demo model is
taken, and the predictors that come with it. Quality as in shared/predictors/metrics.py; time is that of ``loads`` on
one core. The last line is one JSON object.
"""

import argparse
import os
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from common import Bar, median, report

from shared.kernels.threads import thread_environment

if TYPE_CHECKING:
    from shared.models.loader import Checkpoint
    from shared.predictors.gates import GatePredictor
    from shared.predictors.report import Report

ROWS, CALLS, REPEATS = (1, 4, 16, 64), 50, 40
"""Rows of a batch, predictions that are timed together, and how often."""


def milliseconds(predictor: "GatePredictor", hidden: int, rows: int, seed: int) -> float:
    """Time of a prediction of the loads of one layer: median over repeats, of the slowest pair."""
    x = np.random.default_rng(seed).standard_normal((rows, hidden)).astype(np.float32)
    ids, slowest = np.zeros((rows, 1), np.int32), 0.0
    for pair in sorted(predictor.pairs):
        spent = []
        for _ in range(REPEATS):
            start = time.perf_counter()
            for _ in range(CALLS):
                predictor.loads(*pair, x, ids)
            spent.append((time.perf_counter() - start) / CALLS)
        slowest = max(slowest, median(spent))
    return slowest * 1e3


def judged(checkpoint: "Checkpoint", predictor: Path, texts: list[Path]) -> "Report":
    """Quality on whole passages of the texts."""
    from tokenizers import Tokenizer

    from shared.predictors.recording import CONTEXT, Reader, passages_of
    from shared.predictors.report import evaluate

    tokens = passages_of(texts, Tokenizer.from_file(str(checkpoint.source.tokenizer_file)), CONTEXT)
    reader = Reader(checkpoint)
    return evaluate(checkpoint, predictor, map(reader.read, tokens), texts)


def summary(result: "Report") -> dict[str, Any]:
    """By distance and predictor: mean and worst recall, least correlation, mean error, over layers."""
    table: dict[str, Any] = {}
    for distance in result.distances:
        for name, pairs in result.quality.items():
            ours = [quality for (_, d), quality in pairs.items() if d == distance]
            table.setdefault(f"d{distance}", {})[name] = {
                "recall": round(sum(q.recall for q in ours) / len(ours), 4),
                "worst_recall": round(min(q.recall for q in ours), 4),
                "worst_correlation": round(min(q.correlation for q in ours), 4),
                "error": round(sum(q.error for q in ours) / len(ours), 4),
            }
    return table


def lead(table: dict[str, Any], baseline: str) -> float:
    """By how much the tuned predictors' mean recall is above a baseline's, at the distance where that is least."""
    return min(row["tuned"]["recall"] - row[baseline]["recall"] for row in table.values())


def bars(table: dict[str, Any], times: dict[int, float], nbytes: int) -> list[Bar]:
    near = [row["tuned"] for distance, row in table.items() if distance == "d1"]
    return [
        *(Bar("recall at d = 1, mean over layers", row["recall"], 0.85) for row in near),
        *(Bar("recall at d = 1, worst layer", row["worst_recall"], 0.83) for row in near),
        *(Bar("load correlation at d = 1, worst layer", row["worst_correlation"], 0.97) for row in near),
        Bar("recall above the untuned gate, least of all d", lead(table, "untuned"), 1e-4),
        Bar("recall above history, least of all d", lead(table, "history"), 1e-4),
        Bar("ms per layer, 64 rows, one core", times[64], 0.2, at_most=True),
        Bar("MB of all predictors", nbytes / 1e6, 2.0, at_most=True),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--heldout", type=Path, help="directory of texts")
    parser.add_argument("--model", default="")
    parser.add_argument("--predictor", type=Path, help="default: predictors/ in the model's directory")
    parser.add_argument("--json", action="store_true", help="accepted for uniformity: the last line always is JSON")
    args = parser.parse_args()
    texts = sorted(args.heldout.glob("*.txt")) if args.heldout else []
    if not texts:
        print("bench/predictor.py needs --heldout DIR with texts (*.txt) that nothing was trained on: nothing measured")
        report("predictor", {"skipped": "no held-out text"})
        return
    os.environ.update(thread_environment(len(os.sched_getaffinity(0)), os.environ))
    from shared.models.loader import open_checkpoint
    from shared.predictors.files import load_predictors

    checkpoint = open_checkpoint(args.model)
    directory = args.predictor or checkpoint.path / "predictors"
    _, predictor = load_predictors(directory, checkpoint.digest)
    times = {rows: milliseconds(predictor, checkpoint.spec.hidden, rows, seed=rows) for rows in ROWS}
    result = judged(checkpoint, directory, texts)
    table = summary(result)
    for distance, row in table.items():
        for name, figures in row.items():
            print(f"{distance} {name:>14}  " + "  ".join(f"{key} {value:.4f}" for key, value in figures.items()))
    print("ms per layer: " + ", ".join(f"{rows} rows {spent:.4f}" for rows, spent in times.items()), flush=True)
    facts = {"model": checkpoint.name, "digest": checkpoint.digest, "nbytes": predictor.nbytes, "quality": table}
    facts["ms"] = {str(rows): round(spent, 4) for rows, spent in times.items()}
    report("predictor", facts, bars(table, times, predictor.nbytes))


if __name__ == "__main__":
    main()
