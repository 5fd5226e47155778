"""What a replay reads: arrivals, routing, inputs. What is wrong with them is said, with the line."""

from pathlib import Path

import numpy as np
import pytest

from shared.errors import ConfigError
from shared.replay.arrivals import BadArrivals, read_arrivals
from shared.replay.inputs import load_inputs
from shared.replay.routing import Mismatch, add_rows, read_passages
from shared.replay.session import Files, read_domains
from shared.traces.records import BadTrace
from tests.unit.replay_cases import EXPERTS, choices, passages, write_trace

HEAD = "TIMESTAMP,ContextTokens,GeneratedTokens\r\n"


def written(tmp_path: Path, *lines: str, head: str = HEAD) -> Path:
    path = tmp_path / "arrivals.csv"
    path.write_bytes((head + "\r\n".join(lines)).encode())
    return path


def test_arrivals_have_seven_digits_and_no_newline_at_the_end(tmp_path: Path) -> None:
    path = written(tmp_path, "2023-11-16 18:15:46.6805900,374,44", "2023-11-16 18:15:50.9951691,3960,109")
    arrivals = read_arrivals(path, most_context=2048)
    assert arrivals.times.tolist() == pytest.approx([0, 4.3145791], abs=1e-6)
    assert arrivals.context.tolist() == [374, 2048]
    assert arrivals.generated.tolist() == [44, 109]
    assert len(arrivals.first(4).times) == 1
    assert len(arrivals.first(0).times) == 2


@pytest.mark.parametrize(
    ("lines", "problem"),
    [
        (["2023-11-16 18:15:46.1,3,4", "2023-11-16 18:15:45.9,3,4"], "line 3: its time is before"),
        (["2023-11-16 18:15:46.1,3,4", "2023-11-16 18:15:47.9,,4"], "line 3: 2 values, expected 3"),
        (["2023-11-16 18:15:46.1,3"], "line 2: 2 values, expected 3"),
        (["yesterday,3,4"], "line 2: Invalid isoformat"),
        (["2023-11-16 18:15:46.1,3,0"], "line 2: 3 and 0 tokens"),
        ([], "line 2: there are no requests"),
    ],
)
def test_arrivals_that_are_none_are_refused_with_the_line(tmp_path: Path, lines: list[str], problem: str) -> None:
    with pytest.raises(BadArrivals, match=problem):
        read_arrivals(written(tmp_path, *lines), 2048)


def test_columns_may_come_in_any_order_but_none_may_lack(tmp_path: Path) -> None:
    path = written(tmp_path, "7,2023-11-16 18:15:46,9", head="generated,timestamp,context\n")
    assert read_arrivals(path, 99).context.tolist() == [9]
    with pytest.raises(BadArrivals, match="line 1: columns are a,b, expected TIMESTAMP"):
        read_arrivals(written(tmp_path, head="a,b\n"), 99)


def test_passages_are_differences_of_sums_also_round_the_end(tmp_path: Path) -> None:
    ids = choices(60, seed=3)
    trace = read_passages(write_trace(tmp_path / "a.trace", ids, (1, 2, 5)))
    assert (trace.layers, trace.rows, trace.experts, trace.top_k) == ((1, 2, 5), 60, EXPERTS, 2)
    loads = np.zeros((3, EXPERTS), np.int64)
    add_rows(trace.sums, np.array([50, 70]), np.array([25, 130]), loads)
    rows = np.concatenate([np.arange(50, 75), np.arange(70, 200)]) % 60
    expected = [np.bincount(ids[rows, layer].ravel(), minlength=EXPERTS) for layer in range(3)]
    assert (loads == expected).all()


def test_a_trace_with_an_unknown_layer_is_refused_with_the_record(tmp_path: Path) -> None:
    routing = read_passages(write_trace(tmp_path / "a.trace", choices(60, 0), (0, 1, 2)))
    with pytest.raises(BadTrace, match=r"record 3: layer 9 is not in the routing trace: \[0, 1, 2\] are"):
        read_passages(write_trace(tmp_path / "b.trace", choices(60, 0), (1, 2, 9)), routing)


def test_predictions_of_other_rows_and_models_are_refused(tmp_path: Path) -> None:
    routing = read_passages(write_trace(tmp_path / "a.trace", choices(60, 0), (0, 1, 2)))
    with pytest.raises(Mismatch, match="40 rows of 8 experts, but the routing has 60 of 8"):
        read_passages(write_trace(tmp_path / "b.trace", choices(40, 0), (0, 1, 2)), routing)


def test_the_distance_of_a_predicted_trace_is_checked(tmp_path: Path) -> None:
    routing = write_trace(tmp_path / "a.trace", choices(60, 0), (0, 1, 2))
    predicted = write_trace(tmp_path / "b.trace", choices(60, 0)[:, 1:], (1, 2))
    ((_, found),) = read_domains(Files((routing,), (predicted,), tmp_path), 1)
    assert found is not None
    assert found.known.tolist() == [False, True, True]
    with pytest.raises(ConfigError, match=r"--distance: 2, but .* predicts from a distance of 1"):
        read_domains(Files((routing,), (predicted,), tmp_path), 2)
    with pytest.raises(ConfigError, match="2 predicted traces for 1 of routing"):
        read_domains(Files((routing,), (predicted, predicted), tmp_path), 1)


def test_profiles_are_complete_and_an_unknown_one_lists_those_that_there_are(tmp_path: Path) -> None:
    for name in ("local", "paper"):
        inputs = load_inputs(name)
        assert inputs.slots * inputs.instances >= (inputs.layers or 6) * 32, "every expert has a home"
        assert inputs.warm_s < inputs.cold_s
        assert inputs.scaled("row_s", 2).row_s == 2 * inputs.row_s
    with pytest.raises(ConfigError, match=r"'mine' is not in inputs.toml: there are local, paper"):
        load_inputs("mine")
    file = tmp_path / "x.toml"
    file.write_text("[mine]\nabout = 'x'\nspeed = 3\n")
    with pytest.raises(ConfigError, match="unknown fields speed"):
        load_inputs("mine", file)
    file.write_text("[mine]\nabout = 'x'\n")
    with pytest.raises(ConfigError, match="instances: field required"):
        load_inputs("mine", file)


def test_passages_of_a_case_are_what_they_say() -> None:
    assert passages(50, known=(False, True, True)).sums[-1].sum(axis=1).tolist() == [0, 100, 100]
