"""``moemesh predictor train`` without its command line: text -> recorded rows -> nets -> files and a report."""

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer

from shared.models.loader import Checkpoint
from shared.predictors.base import Pair, possible_pairs, target
from shared.predictors.files import FILE, BadPredictors, Trained, save_predictors
from shared.predictors.gates import Net, copied_gate
from shared.predictors.recorded import Recorded
from shared.predictors.recording import CONTEXT, Reader, passages_of
from shared.predictors.report import Report, evaluate
from shared.predictors.training import Training, fit, recall_of

TRAINED_SHARE = 0.7
"""Of the passages; the others judge. The paper's split (arXiv 2603.06350, section 4.1)."""
REPORT = "report.json"
Told = Callable[[str], None]
"""Hears what is being done, in words."""


@dataclass(frozen=True)
class Job:
    """What to train on."""

    texts: Sequence[Path]
    distances: Sequence[int]
    without: Sequence[Path] = ()
    """Texts that no passage may overlap with."""
    rows: int = 200_000
    """About so many are read, spread over the texts."""
    context: int = CONTEXT
    threads: int = 0
    """That read; 0: all."""
    training: Training = field(default_factory=Training)


def train_predictors(checkpoint: Checkpoint, job: Job, out: Path, told: Told) -> Report:
    """Writes predictors and REPORT to ``out``, and returns the report: quality on the passages that were left out.

    Raises BadPredictors when ``out`` has some already, MoemeshError for texts that cannot be read.
    """
    if (out / FILE).exists():
        raise BadPredictors(out / FILE, "exists already")
    told("tokenizing")
    tokenizer = Tokenizer.from_file(str(checkpoint.source.tokenizer_file))
    texts = passages_of(job.texts, tokenizer, job.context, job.rows, job.without)
    order, first = split(len(texts), job.training.seed)
    with Recorded(checkpoint.spec, len(texts), job.context) as recorded:
        reader = Reader(checkpoint, job.context, job.threads)
        total = len(texts) * job.context
        recorded.read(reader, [texts[n] for n in order], lambda rows: told(f"reading: {rows} of {total} rows"))
        torch.set_num_threads(1)  # sums in one order, whatever the number of cores; reading takes longer
        nets, profile = fit_all(checkpoint, recorded, first, job, told)
        save_predictors(out, Trained.of(checkpoint.facts(), checkpoint.spec.hidden), nets)
        told("judging")
        report = evaluate(checkpoint, out, recorded.passages(first), job.texts)
    settings = asdict(job.training) | {"rows": len(texts) * job.context, "profile": profile}
    (out / REPORT).write_text(json.dumps(report.as_json() | {"training": settings}, indent=1) + "\n")
    return report


def split(count: int, seed: int) -> tuple[list[int], int]:
    """An order of the passages, and how many of it are to train on; both parts are in the order of the text."""
    first = max(1, round(TRAINED_SHARE * count))
    shuffled = np.random.default_rng(seed).permutation(count)
    return [*sorted(shuffled[:first].tolist()), *sorted(shuffled[first:].tolist())], first


def fit_all(
    checkpoint: Checkpoint, recorded: Recorded, passages: int, job: Job, told: Told
) -> tuple[dict[Pair, Net], list[dict[str, float | int | bool]]]:
    """Nets of all pairs from the first so many passages; what the recall of copies was there, and which were tuned."""
    layers, nets, profile = checkpoint.spec.moe_layers, {}, []
    for layer, distance in possible_pairs(layers, job.distances):
        later = target(layers, layer, distance)
        copy, examples = copied_gate(checkpoint, later), recorded.examples(layer, later, passages)
        recall = recall_of(copy, examples)
        tune = recall < job.training.threshold
        todo = "tuning" if tune else "keeping"
        told(f"layer {layer} + {distance}: {todo} a copy of the gate with recall {recall:.3f}")
        nets[layer, distance] = fit(copy, examples, job.training, tune)
        profile.append({"layer": layer, "distance": distance, "recall": round(recall, 4), "tuned": tune})
    return nets, profile
