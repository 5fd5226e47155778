"""Load prediction: what a predictor says of rows, how that is judged, and files that are not to be trusted."""

import json
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from shared.kernels.cpu_predict import CHUNK
from shared.predictors.base import possible_pairs, target
from shared.predictors.baselines import History, PreviousLayer
from shared.predictors.files import FILE, FORMAT, BadPredictors, Trained, load_predictors, save_predictors
from shared.predictors.gates import GatePredictor, Net
from shared.predictors.metrics import Tally, hits, judge, pearson
from shared.predictors.recording import OVERLAP, Passage, _runs, batches
from shared.predictors.trainer import split
from shared.predictors.training import Examples, Training, fit, recall_of

EXPERTS, HIDDEN, TOP_K = 7, 40, 3
LAYERS = (1, 2, 4)
TRAINED = Trained("toy", "d" * 64, LAYERS, EXPERTS, TOP_K, HIDDEN)


def net(width: int, seed: int = 0, correction: bool = False) -> Net:
    draw = torch.Generator().manual_seed(seed)
    shapes = ((EXPERTS, HIDDEN), (EXPERTS,), (width, HIDDEN), (width,), (EXPERTS, width))
    shapes += ((EXPERTS,),) if correction else ((0,),)
    return Net(*(torch.randn(shape, generator=draw) for shape in shapes))


def scores_of(n: Net, rows: np.ndarray) -> torch.Tensor:
    """The formula of ``Net`` in torch."""
    x = torch.from_numpy(rows)
    scores = x @ n.gate.float().T + n.bias + torch.relu(x @ n.up.float().T + n.up_bias) @ n.down.float().T
    return torch.sigmoid(scores) + n.correction if n.correction.numel() else scores


def rows_of(count: int, seed: int = 1) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((count, HIDDEN)).astype(np.float32)


def no_ids(rows: np.ndarray) -> np.ndarray:
    return np.zeros((len(rows), TOP_K), np.int32)


def ids_of(*rows: list[int]) -> np.ndarray:
    return np.array(rows, np.int32)


# ---- pairs ------------------------------------------------------------------------------------------------------


def test_distance_counts_layers_with_experts():
    assert possible_pairs(LAYERS, [2, 1, 1, 9]) == ((1, 1), (2, 1), (1, 2))
    assert [target(LAYERS, *pair) for pair in possible_pairs(LAYERS, [1, 2])] == [2, 4, 4]


# ---- gates ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("width", [0, 5, 33])
@pytest.mark.parametrize("count", [0, 1, 6, CHUNK, 2 * CHUNK + 3])
def test_scores_and_loads_are_the_formula(count, width, dtype):
    stored, rows = net(width).stored(dtype), rows_of(count)
    predictor, expected = GatePredictor({(1, 1): stored}, TOP_K), scores_of(stored, rows)
    assert np.allclose(predictor.scores(1, 1, rows, no_ids(rows)), expected.numpy(), atol=1e-4)
    likely = torch.sigmoid(expected).sum(dim=0).numpy()
    loads = predictor.loads(1, 1, rows, no_ids(rows))
    assert np.allclose(loads, likely * (count * TOP_K / likely.sum() if count else 0), rtol=1e-4)
    assert loads.sum() == pytest.approx(count * TOP_K, rel=1e-4)


@pytest.mark.parametrize("correction", [False, True])
def test_hard_loads_count_the_best_of_every_row(correction):
    gate, rows = net(0, correction=correction), rows_of(CHUNK + 9)
    predictor = GatePredictor({(1, 1): gate}, TOP_K, soft=False)
    best = scores_of(gate, rows).topk(TOP_K, dim=1).indices.flatten()
    assert predictor.loads(1, 1, rows, no_ids(rows)).tolist() == torch.bincount(best, minlength=EXPERTS).tolist()


def test_rows_that_kernels_would_misread_are_refused():
    predictor = GatePredictor({(1, 1): net(0)}, TOP_K)
    wrong: list[Any] = [rows_of(4).astype(np.float64), rows_of(4)[:, :-1], rows_of(8)[::2]]
    for rows in wrong:
        with pytest.raises(ValueError, match="contiguous"):
            predictor.loads(1, 1, rows, no_ids(rows))
        with pytest.raises(ValueError, match="contiguous"):
            predictor.scores(1, 1, rows, no_ids(rows))


def test_memory_is_that_of_the_tensors_as_they_are_stored():
    stored = net(5).stored(torch.bfloat16)
    assert stored.nbytes == 2 * (EXPERTS * HIDDEN + 5 * HIDDEN + EXPERTS * 5) + 4 * (EXPERTS + 5)
    assert GatePredictor({(1, 1): stored}, TOP_K).nbytes == stored.nbytes + 4 * EXPERTS


# ---- baselines --------------------------------------------------------------------------------------------------


def test_history_halves_what_is_a_half_life_old():
    history = History(LAYERS, [1], experts=4, top_k=2, half_life=2)
    history.observe(2, ids_of([0, 1], [0, 1]))
    assert history.loads(1, 1, rows_of(3), ids_of(*[[2, 3]] * 3)).tolist() == [3, 3, 0, 0]
    history.observe(2, ids_of([2, 3], [2, 3]))  # two rows of weight 1 beside two of weight a half
    shares = history.loads(1, 1, rows_of(3), ids_of(*[[2, 3]] * 3)) / 6
    assert shares == pytest.approx([1 / 6, 1 / 6, 1 / 3, 1 / 3])
    assert history.loads(2, 1, rows_of(2), ids_of([0, 1], [0, 1])).tolist() == [1, 1, 1, 1]  # of layer 4: nothing seen


def test_history_scores_every_row_alike():
    history = History(LAYERS, [1], experts=4, top_k=2)
    history.observe(2, ids_of([3, 1]))
    assert history.scores(1, 1, rows_of(2), ids_of([0, 1], [0, 2])).tolist() == [[0, 0.5, 0, 0.5]] * 2


def test_previous_layer_repeats_what_was_chosen_there():
    previous = PreviousLayer(LAYERS, [1], experts=4)
    ids = ids_of([3, 1], [3, 0])
    assert previous.loads(1, 1, rows_of(2), ids).tolist() == [1, 1, 0, 2]
    assert previous.scores(1, 1, rows_of(2), ids).tolist() == [[0, 1, 0, 1], [1, 0, 0, 1]]


# ---- metrics ----------------------------------------------------------------------------------------------------


def test_recall_by_hand():
    scores = np.array([[0.9, 0.8, 0.1, 0.0], [0.1, 0.2, 0.3, 0.4], [0, 0, 0, 0]], np.float32)
    assert hits(scores, ids_of([0, 1], [0, 3], [2, 1])) == 2 + 1 + 1  # ties: experts 0 and 1


def test_correlation_and_error_by_hand():
    tally = Tally()
    nothing = np.zeros((2, 3), np.float32)
    tally.add(nothing, np.array([2, 1, 1], np.float32), ids_of([0, 1], [0, 1]))  # true: 2 2 0
    tally.add(nothing, np.array([1, 1, 2], np.float32), ids_of([1, 2], [1, 2]))  # true: 0 2 2
    quality = tally.quality()
    assert quality.error == pytest.approx((2 / 8 + 2 / 8) / 2)
    assert quality.correlation == pytest.approx(np.corrcoef([2, 1, 1, 1, 1, 2], [2, 2, 0, 0, 2, 2])[0, 1])
    assert quality.recall == 6 / 8  # experts 0 and 1 are the best of every row


def test_correlation_with_a_constant_is_none():
    assert pearson(np.ones(3), np.arange(3.0)) == 0


def test_every_predictor_is_judged_on_what_came_before_only():
    """History must not have seen the batch that it is asked about."""
    first, second = ids_of([0, 1]), ids_of([2, 3])
    passage = Passage(dict.fromkeys((1, 2), rows_of(2)), dict.fromkeys((1, 2), np.concatenate([first, second])))
    history = History((1, 2), [1], experts=4, top_k=2)
    quality = judge({"history": history}, [passage], (1, 2), size=1)["history"][1, 1]
    assert quality.recall == 2 / 4  # the first is a tie of all, won by 0 and 1; the second expects what the first chose
    assert quality.error == pytest.approx((0.5 + 1) / 2)


def test_batches_follow_the_text():
    passage = Passage({1: rows_of(5)}, {1: np.arange(5, dtype=np.int32)[:, None]})
    whole = [batch.ids[1].ravel().tolist() for batch in batches([passage], 2)]
    rest = [batch.ids[1].ravel().tolist() for batch in batches([passage], 2, whole=False)]
    assert whole == [[0, 1], [2, 3]] and rest == [[0, 1], [2, 3], [4]]


# ---- training ---------------------------------------------------------------------------------------------------


def examples(count: int = 3000) -> Examples:
    """Choices that follow a net with hidden units, which a gate alone cannot imitate."""
    rows = rows_of(count, seed=5)
    chosen = scores_of(net(16, seed=9), rows).topk(TOP_K, dim=1).indices.numpy().astype(np.uint16)
    return Examples(rows.astype(np.float16), chosen)


def test_training_is_deterministic_and_beats_the_copy():
    copy, seen = net(0, seed=9), examples()
    training = Training(width=16, epochs=8, batch=100)
    once, again = (fit(copy, seen, training, tune=True) for _ in range(2))
    assert all(torch.equal(once.tensors[name], again.tensors[name]) for name in once.tensors)
    other = fit(copy, seen, Training(width=16, epochs=8, batch=100, seed=1), tune=True)
    assert not torch.equal(once.gate, other.gate)
    assert recall_of(once, seen) > recall_of(copy, seen) + 0.05


def test_a_gate_that_is_kept_ranks_as_before_and_learns_how_likely_choices_are():
    rows = rows_of(3000, seed=5)
    copy = net(0, seed=9)
    noisy = scores_of(copy, rows) + torch.randn(3000, EXPERTS, generator=torch.Generator().manual_seed(2)) * 3
    seen = Examples(rows.astype(np.float16), noisy.topk(TOP_K, dim=1).indices.numpy())
    kept = fit(copy, seen, Training(epochs=40, batch=100, rate=0.02), tune=False)
    before, after = (scores_of(n, rows) for n in (copy, kept))
    assert torch.equal(before.argsort(dim=1)[:, -TOP_K:].sort().values, after.argsort(dim=1)[:, -TOP_K:].sort().values)
    assert torch.sigmoid(after).sum(dim=1).mean().item() == pytest.approx(TOP_K, rel=0.05)


def test_seven_tenths_train_and_both_parts_follow_the_text():
    order, first = split(10, seed=0)
    assert first == 7 and sorted(order) == list(range(10))
    assert order[:7] == sorted(order[:7]) and order[7:] == sorted(order[7:])
    assert split(10, seed=1)[0] != order


def test_runs_find_an_overlap_wherever_it_lies():
    tokens = np.random.default_rng(0).integers(0, 4096, 200).astype(np.int32)
    other = np.concatenate([tokens[300:], tokens[50 : 50 + OVERLAP], tokens[:9]])
    assert np.isin(_runs(other), _runs(tokens)).any()
    assert not np.isin(_runs(other[1:]), _runs(tokens)).any()
    assert not len(_runs(tokens[: OVERLAP - 1]))


# ---- files ------------------------------------------------------------------------------------------------------


def saved(directory, width: int = 5):
    nets = {(1, 1): net(width), (2, 1): net(0, seed=3)}
    return save_predictors(directory, TRAINED, nets), {pair: n.stored(torch.bfloat16) for pair, n in nets.items()}


def test_what_is_saved_is_loaded_again(tmp_path):
    _, nets = saved(tmp_path / "p")
    trained, predictor = load_predictors(tmp_path / "p", TRAINED.digest)
    assert trained == TRAINED and predictor.pairs == set(nets)
    for pair, stored in nets.items():
        read = predictor.nets[pair].tensors
        assert read.keys() == stored.tensors.keys()
        assert all(torch.equal(read[name], tensor) for name, tensor in stored.tensors.items())


def test_predictors_are_never_overwritten(tmp_path):
    saved(tmp_path)
    with pytest.raises(FileExistsError):
        saved(tmp_path)


def test_predictors_of_another_model_are_refused_by_both_digests(tmp_path):
    saved(tmp_path)
    with pytest.raises(BadPredictors, match=f"toy with digest {'d' * 12}, this model's is {'e' * 12}"):
        load_predictors(tmp_path, "e" * 64)


def test_a_directory_without_predictors_is_refused(tmp_path):
    with pytest.raises(BadPredictors, match="moemesh predictor train"):
        load_predictors(tmp_path, TRAINED.digest)


@pytest.mark.parametrize("length", [0, 7, 100, -1])
def test_a_file_that_was_cut_off_is_refused(tmp_path, length):
    path, _ = saved(tmp_path)
    path.write_bytes(path.read_bytes()[:length])
    with pytest.raises(BadPredictors, match=r"predictors\.safetensors: damaged or cut off"):
        load_predictors(tmp_path, TRAINED.digest)


def rewritten(path, metadata, **changed):
    tensors = load_file(path) | changed
    save_file({name: tensor for name, tensor in tensors.items() if tensor is not None}, path, metadata)


def meta(**changed):
    fields = {"model": "toy", "digest": TRAINED.digest, "layers": LAYERS, "experts": EXPERTS, "top_k": TOP_K}
    return {FORMAT: json.dumps(fields | {"hidden": HIDDEN, "version": 1} | changed)}


@pytest.mark.parametrize(
    ("metadata", "changed", "problem"),
    [
        ({"format": "pt"}, {}, "not a file of predictors"),
        ({FORMAT: "{"}, {}, "metadata is damaged"),
        (meta(version=2), {}, "version 2"),
        (meta(surprise=1), {}, "metadata is damaged"),
        (meta(), {"1.1.down": None}, r"1\.1\.down is missing"),
        (meta(), {"1.1.bias": torch.zeros(EXPERTS + 1)}, r"1\.1\.bias .* not \[7\]"),
        (meta(), {"1.1.gate": torch.full((EXPERTS, HIDDEN), torch.nan)}, "not finite"),
        (meta(), {"4.1.gate": torch.zeros(EXPERTS, HIDDEN)}, r"\(4, 1\)"),
    ],
)
def test_what_is_not_as_it_was_written_is_refused_with_the_reason(tmp_path, metadata, changed, problem):
    path, _ = saved(tmp_path)
    rewritten(path, metadata, **changed)
    with pytest.raises(BadPredictors, match=problem) as caught:
        load_predictors(tmp_path, TRAINED.digest)
    assert caught.value.where == tmp_path / FILE
