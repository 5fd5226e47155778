"""A recorder makes one trace of what several instances send, and knows what has not come."""

from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from shared.cli.main import build_app
from shared.traces.load import load_trace
from shared.traces.native import Header, TraceWriter, encode_record, id_dtype
from shared.traces.recorder import Recorder
from shared.traces.records import BadTrace
from shared.traces.wire import RoutingTrace

HEADER = Header(model="toy", digest="d", experts=8, layers=(1, 3))


def sent(attention: str, seen: int, *exchanges: tuple[int, int, list[list[int]]], ended: tuple = ()) -> RoutingTrace:
    """A message with (layer, step, ids)."""
    records = b"".join(encode_record(id_dtype(8), layer, step, np.array(ids)) for layer, step, ids in exchanges)
    return RoutingTrace(attention=attention, incarnation=1, records=records, seen=seen, ended=ended)


def record(path: Path, *messages: RoutingTrace) -> Recorder:
    with TraceWriter(path, HEADER) as writer:
        recorder = Recorder(writer, HEADER, "me")
        for message in messages:
            recorder.take(RoutingTrace.decode(message.encode()))
    return recorder


def test_steps_get_small_numbers_and_those_of_a_group_the_same(tmp_path: Path) -> None:
    recorder = record(
        tmp_path / "t",
        sent("a", 1, (1, 70, [[0, 1]])),
        sent("b", 2, (1, 900, [[2, 3], [4, 5]]), (3, 900, [[1, 2], [1, 2]])),
        sent("a", 4, (3, 70, [[6, 7]]), (1, 1 << 63, [[0, 2]]), (3, 1 << 63, [[0, 3]])),
        sent("b", 3, (1, 1 << 63, [[5, 6]])),
    )
    assert [(e.layer, e.step, e.ids.tolist()) for e in load_trace(tmp_path / "t")] == [
        (1, 0, [[0, 1]]), (1, 1, [[2, 3], [4, 5]]), (3, 1, [[1, 2], [1, 2]]),
        (3, 0, [[6, 7]]), (1, 2, [[0, 2]]), (3, 2, [[0, 3]]), (1, 2, [[5, 6]]),
    ]  # fmt: skip
    assert (recorder.rows, recorder.exchanges, recorder.lost, len(recorder.sources)) == (4, 7, 0, 2)


def test_what_was_dropped_or_lost_on_the_way_is_counted(tmp_path: Path) -> None:
    recorder = record(
        tmp_path / "t",
        sent("a", 1000),  # it has recorded for others before
        sent("a", 1003, (1, 1, [[0, 1]])),  # two were dropped
        sent("a", 1010, (1, 2, [[0, 1]])),  # and a message did not come
        sent("a", 1010, ended=("another",)),
    )
    assert (recorder.exchanges, recorder.lost, recorder.complete) == (2, 8, False)


def test_a_pause_in_which_nobody_recorded_is_told(tmp_path: Path) -> None:
    first, other = sent("a", 0), sent("b", 0)
    messages = [m.model_copy(update={"started": name}) for m in (first, other, first) for name in ("you", "me")]
    assert record(tmp_path / "t", *messages).pauses == 1


def test_the_end_is_known_when_every_instance_has_said_so(tmp_path: Path) -> None:
    messages = [sent("a", 0), sent("b", 0), sent("a", 0, ended=("you", "me"))]
    assert not record(tmp_path / "s", *messages).complete
    assert record(tmp_path / "t", *messages, sent("b", 0, ended=("me",))).complete


@pytest.mark.parametrize("ids", [[[0, 8]], [[1, 1]]])
def test_records_that_no_reader_would_take_are_not_written(tmp_path: Path, ids: list[list[int]]) -> None:
    with pytest.raises(BadTrace, match="what a sent, record 1"):
        record(tmp_path / "t", sent("a", 1, (1, 1, ids)))
    assert load_trace(tmp_path / "t") == []


# ---- moemesh trace ------------------------------------------------------------------------------------------


def run(*arguments: object):
    return CliRunner().invoke(build_app(), ["trace", *map(str, arguments)])


def test_show_says_what_is_in_a_trace(tmp_path: Path) -> None:
    record(tmp_path / "t", sent("a", 3, (1, 1, [[0, 1], [1, 0], [2, 3]]), (3, 1, [[1, 2]]), (1, 2, [[4, 5]])))
    result = run("show", tmp_path / "t")
    assert result.exit_code == 0, result.output
    lines = result.output.splitlines()
    assert lines[0] == "moemesh trace of toy: 2 layers, 8 experts, top-2, 2 steps, 3 exchanges"
    assert lines[2].split() == ["1", "4", "2", "3.0", "2", "4", "50.0%"]
    assert lines[3].split() == ["3", "1", "1", "2.0", "2", "2", "100.0%"]


def test_show_warns_of_warm_up_passes(tmp_path: Path) -> None:
    record(tmp_path / "t", sent("a", 2, (1, 1, [[0, 1]] * 60), (3, 1, [[1, 2]])))
    result = run("show", tmp_path / "t")
    assert "60 of 60 rows of layer 1 chose the same experts [0, 1]: probably warm-up" in result.stderr


def test_show_reads_traces_of_others(tmp_path: Path) -> None:
    line = '{"layer": 2, "step": 1, "num_tokens": 1, "topk": 2, "top_indices": [[3, 9]]}\n'
    (tmp_path / "t").write_text(line)
    result = run("show", tmp_path / "t")
    assert "Megatron-core JSONL trace: 1 layers, 10 experts, top-2" in result.output


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (b'{"layer": 2, "step": 1, "num_tokens": 1, "topk": 1, "top_indices": [[3]]}\n{"layer', "line 2"),
        (b"MOETRACE\x01", "header"),
        (b"once upon a time", "neither an .npy file nor base64"),
        (None, "No such file"),
    ],
)
def test_show_refuses_what_it_cannot_read_and_says_where(tmp_path: Path, content: bytes | None, problem: str) -> None:
    if content is not None:
        (tmp_path / "t").write_bytes(content)
    result = run("show", tmp_path / "t")
    assert result.exit_code == 1
    assert problem in str(result.exception)
    assert str(tmp_path / "t") in str(result.exception)


def test_a_trace_that_was_cut_off_is_refused_with_the_record(tmp_path: Path) -> None:
    record(tmp_path / "t", sent("a", 2, (1, 1, [[0, 1]]), (3, 1, [[0, 1]])))
    (tmp_path / "t").write_bytes((tmp_path / "t").read_bytes()[:-1])
    result = run("show", tmp_path / "t")
    assert "record 2: the file is cut off" in str(result.exception)
