"""``moemesh predictor`` on a tiny random model: train, judge and apply agree with each other, twice over."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from typer.testing import CliRunner

from shared.cli.main import build_app
from shared.errors import ConfigError, MoemeshError
from shared.models.loader import open_checkpoint
from shared.models.presets import make_checkpoint
from shared.predictors.files import FILE, BadPredictors
from shared.predictors.gates import untuned_gates
from shared.predictors.recording import Passage, Reader
from shared.predictors.report import Report, evaluate
from shared.predictors.trainer import REPORT, Job, train_predictors
from shared.predictors.training import Training
from shared.traces.load import load_trace

TEXT = Path(__file__).parents[2] / "docs" / "operations.md"
OTHER = Path(__file__).parents[2] / "README.md"
CONTEXT = 128


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    directory = tmp_path_factory.mktemp("model") / "m"
    make_checkpoint("tiny-qwen3", directory)
    return str(directory)


def trained(model: str, out: Path, threshold: float = 2.0) -> Report:
    training = Training(threshold, width=8, epochs=1, batch=256)
    job = Job([TEXT], [1, 2], rows=4096, context=CONTEXT, training=training)
    return train_predictors(open_checkpoint(model), job, out, lambda words: None)


@pytest.fixture(scope="module")
def predictors(model: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("predictors") / "p"
    trained(model, out)
    return out


def test_training_again_gives_the_same_bytes(model: str, predictors: Path, tmp_path: Path) -> None:
    trained(model, tmp_path / "again")
    assert (tmp_path / "again" / FILE).read_bytes() == (predictors / FILE).read_bytes()
    assert (tmp_path / "again" / REPORT).read_text() == (predictors / REPORT).read_text()
    assert (predictors / FILE).stat().st_mode & 0o444 == 0o444


def test_only_pairs_whose_copy_is_below_the_threshold_are_tuned(model: str, predictors: Path, tmp_path: Path) -> None:
    profile = json.loads((predictors / REPORT).read_text())["training"]["profile"]
    assert all(pair["tuned"] for pair in profile)
    recalls = sorted(pair["recall"] for pair in profile)
    trained(model, tmp_path / "some", threshold=recalls[1] - 1e-4)
    tensors = load_file(tmp_path / "some" / FILE)
    tuned = {name for name in tensors if name.endswith(".up")}
    assert tuned == {f"{p['layer']}.{p['distance']}.up" for p in profile if p["recall"] == recalls[0]}


def test_the_reader_sees_what_gates_read_and_choose(model: str) -> None:
    """The untuned gate of a layer, on the rows that this very layer reads, would choose what was chosen."""
    checkpoint = open_checkpoint(model)
    passage = Reader(checkpoint, CONTEXT).read(np.arange(1, CONTEXT + 1, dtype=np.int32))
    gates = untuned_gates(checkpoint, [1])
    for layer, later in ((0, 1), (1, 2)):
        scores = gates.scores(layer, 1, passage.rows[later], passage.ids[later])
        best = np.argsort(-scores, axis=1, kind="stable")[:, : passage.ids[later].shape[1]]
        assert np.array_equal(np.sort(best, axis=1), np.sort(passage.ids[later], axis=1))


def test_a_passage_does_not_depend_on_what_was_read_before(model: str) -> None:
    reader, tokens = Reader(open_checkpoint(model), CONTEXT), np.arange(1, CONTEXT + 1, dtype=np.int32)
    first: Passage = reader.read(tokens)
    reader.read(tokens[::-1].copy())
    again = reader.read(tokens)
    assert all(np.array_equal(first.rows[layer], again.rows[layer]) for layer in first.rows)


def test_applied_traces_have_the_recall_that_evaluation_finds(model: str, predictors: Path, tmp_path: Path) -> None:
    arguments = ["--model", model, "--predictor", str(predictors), "--text", str(OTHER), "--context", str(CONTEXT)]
    done = CliRunner().invoke(build_app(), ["predictor", "apply", *arguments, "--out", str(tmp_path / "t")])
    assert done.exit_code == 0, done.output
    routing = {(e.step, e.layer): e.ids for e in load_trace(tmp_path / "t" / "routing.trace")}
    judged = quality_of(model, predictors)
    for distance in (1, 2):
        foreseen = load_trace(tmp_path / "t" / f"predicted-d{distance}.trace")
        assert {e.layer for e in foreseen} == set(range(distance, 3))
        for layer in range(distance, 3):
            pairs = [(routing[e.step, layer], e.ids) for e in foreseen if e.layer == layer]
            assert len(pairs) == max(step for step, _ in routing) + 1
            hits = sum((true[:, :, None] == guess[:, None, :]).sum() for true, guess in pairs)
            recall = hits / sum(true.size for true, _ in pairs)
            assert recall == pytest.approx(judged[f"{layer - distance}.{distance}"], abs=1e-4)


def quality_of(model: str, predictors: Path) -> dict[str, float]:
    """Recall of the tuned predictors on OTHER, by layer and distance."""
    from tokenizers import Tokenizer

    from shared.predictors.recording import passages_of

    checkpoint = open_checkpoint(model)
    tokens = passages_of([OTHER], Tokenizer.from_file(str(checkpoint.source.tokenizer_file)), CONTEXT)
    report = evaluate(checkpoint, predictors, map(Reader(checkpoint, CONTEXT).read, tokens), [OTHER])
    return {f"{layer}.{distance}": q.recall for (layer, distance), q in report.quality["tuned"].items()}


def test_evaluate_prints_every_pair_beside_the_baselines(model: str, predictors: Path) -> None:
    arguments = ["--model", model, "--predictor", str(predictors), "--text", str(OTHER), "--context", str(CONTEXT)]
    done = CliRunner().invoke(build_app(), ["predictor", "evaluate", *arguments])
    assert done.exit_code == 0, done.output
    assert all(name in done.output for name in ("tuned", "untuned", "history", "previous"))
    assert f"{quality_of(model, predictors)['0.2']:.3f}" in done.output


def test_predictors_of_another_model_are_refused(predictors: Path, tmp_path: Path) -> None:
    make_checkpoint("tiny-qwen3", tmp_path / "other", hidden_size=64)
    with pytest.raises(BadPredictors, match="trained for m with digest"):
        evaluate(open_checkpoint(str(tmp_path / "other")), predictors, [], [])


def test_what_cannot_be_trained_on_is_refused(model: str, predictors: Path, tmp_path: Path) -> None:
    app, arguments = build_app(), ["predictor", "train", "--model", model, "--text", str(TEXT)]
    with pytest.raises(BadPredictors, match="exists already"):
        CliRunner().invoke(app, [*arguments, "--out", str(predictors)], catch_exceptions=False)
    with pytest.raises(ConfigError, match="--distances"):
        CliRunner().invoke(app, [*arguments, "--out", str(tmp_path), "--distances", "0-2"], catch_exceptions=False)
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    for text, problem in ((tmp_path / "binary", "cannot be read as text"), (tmp_path / "none", "cannot be read")):
        with pytest.raises(MoemeshError, match=problem):
            more = [*arguments[:-1], str(text), "--out", str(tmp_path / "o")]
            CliRunner().invoke(app, more, catch_exceptions=False)
    with pytest.raises(MoemeshError, match="no passage"):
        train = [*arguments, "--without", str(TEXT), "--out", str(tmp_path / "o")]
        CliRunner().invoke(app, train, catch_exceptions=False)


def test_the_predictors_of_the_demo_model_are_for_it() -> None:
    from shared.models.source import DEMO
    from shared.predictors.files import load_predictors

    checkpoint = open_checkpoint("")
    _, predictor = load_predictors(DEMO / "predictors", checkpoint.digest)
    assert len(predictor.pairs) == 15 and predictor.nbytes <= 2_000_000
    rows = torch.randn(64, checkpoint.spec.hidden, generator=torch.Generator().manual_seed(0)).numpy()
    assert predictor.loads(0, 1, rows, np.zeros((64, 4), np.int32)).sum() == pytest.approx(256, rel=1e-4)
