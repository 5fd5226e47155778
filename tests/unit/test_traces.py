"""Routing traces: what is written is read again; what is cut off, damaged or foreign is refused where it is wrong."""

import base64
import io
import json
import logging
import zlib
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from shared.traces.foreign import read_counts, read_megatron, read_vllm
from shared.traces.load import load_trace, open_trace
from shared.traces.native import Header, TraceWriter, read_header, read_native
from shared.traces.records import BadTrace, expert_counts

HEADER = Header(model="toy", digest="d", experts=8, layers=(1, 3))


def rows_of(*rows: list[int]) -> np.ndarray:
    return np.array(rows, np.int32)


def write(path, *exchanges, header=HEADER):
    with TraceWriter(path, header) as writer:
        for layer, step, ids in exchanges:
            writer.append(layer, step, ids)
    return path


@st.composite
def recordings(draw):
    """(experts, list of (layer, step, ids))"""
    experts = draw(st.sampled_from([4, 256, 257, 60000]))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    shapes = draw(st.lists(st.tuples(st.integers(0, 5), st.integers(1, 4)), max_size=6))
    steps = draw(st.lists(st.integers(0, 2**64 - 1), min_size=len(shapes), max_size=len(shapes)))
    ids = [np.argsort(rng.random((rows, min(experts, 300))), axis=1)[:, :k] for rows, k in shapes]
    return experts, [(int(rng.choice([1, 3])), step, i.astype(np.int32)) for step, i in zip(steps, ids, strict=True)]


@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(recordings())
def test_what_is_written_is_read_again(tmp_path, recording):
    experts, exchanges = recording
    header = Header("toy", "d", experts, (1, 3))
    (tmp_path / "t").unlink(missing_ok=True)
    path = write(tmp_path / "t", *exchanges, header=header)
    assert read_header(path) == header
    read = load_trace(path)
    assert [(e.layer, e.step, e.ids.tolist()) for e in read] == [(la, s, i.tolist()) for la, s, i in exchanges]
    assert all(e.ids.dtype == np.int32 for e in read)


def test_a_choice_takes_one_byte(tmp_path):
    ids = np.argsort(np.random.default_rng(0).random((1000, 8)), axis=1)[:, :6]
    path = write(tmp_path / "t", (1, 0, ids))
    assert path.stat().st_size < 6000 + 100


def test_records_can_be_read_while_the_trace_grows(tmp_path):
    with TraceWriter(tmp_path / "t", HEADER) as writer:
        for step in range(3):
            writer.append(1, step, rows_of([0, 5]))
            writer.flush()
            assert [e.step for e in read_native(tmp_path / "t")] == list(range(step + 1))


def test_a_trace_is_never_overwritten(tmp_path):
    write(tmp_path / "t")
    with pytest.raises(FileExistsError):
        write(tmp_path / "t")


@pytest.mark.parametrize(
    ("layer", "ids", "problem"),
    [
        (1, rows_of([0, 8]), "expert 8 does not exist: there are 8"),
        (1, rows_of([0, -1]), "expert -1 does not exist"),
        (1, rows_of([2, 2]), "names an expert twice"),
        (2, rows_of([0, 1]), "layer 2 is not in the header"),
        (1, np.arange(3), "1 dimensions"),
    ],
)
def test_what_no_reader_would_take_is_not_written(tmp_path, layer, ids, problem):
    with TraceWriter(tmp_path / "t", HEADER) as writer, pytest.raises(ValueError, match=problem):
        writer.append(layer, 0, ids)
    assert list(read_native(tmp_path / "t")) == []


def test_a_trace_that_was_cut_off_anywhere_is_refused_after_its_whole_records(tmp_path):
    whole = write(tmp_path / "t", (1, 0, rows_of([0, 1])), (3, 0, rows_of([2, 3]))).read_bytes()
    start = len(write(tmp_path / "empty").read_bytes())
    size = (len(whole) - start) // 2
    for length in range(len(whole)):
        path = tmp_path / "cut"
        path.write_bytes(whole[:length])
        if length in (start, start + size):
            assert len(list(read_native(path))) == (length - start) // size
            continue
        read = []
        with pytest.raises(BadTrace) as caught:
            read.extend(read_native(path))
        number = (length - start) // size + 1
        assert caught.value.where == ("header" if length < start else f"record {number}")


def test_a_damaged_record_is_refused_by_its_number(tmp_path):
    path = write(tmp_path / "t", (1, 0, rows_of([0, 1])), (3, 0, rows_of([2, 3])))
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(BadTrace, match="record 2: damaged"):
        list(read_native(path))


def test_a_record_that_claims_more_than_the_file_has_is_refused_without_reading_it(tmp_path):
    path = write(tmp_path / "t")
    path.write_bytes(path.read_bytes() + np.full(8, 2**32 - 1, "<u4").tobytes())
    with pytest.raises(BadTrace, match="record 1: the file is cut off"):
        list(read_native(path))


def test_more_experts_than_ids_can_name_are_refused(tmp_path):
    with pytest.raises(ValueError, match="65536"):
        replace(HEADER, experts=100_000)


def test_counts_that_are_no_text_are_refused(tmp_path):
    (tmp_path / "c.json").write_bytes(b"\xff\xfe[1]")
    with pytest.raises(BadTrace, match="UTF-8"):
        read_counts(tmp_path / "c.json")


def test_a_record_of_an_expert_that_does_not_exist_is_refused(tmp_path):
    """Made by other hands, with a good checksum."""
    path = write(tmp_path / "t", (1, 0, rows_of([0, 1])))
    data = path.read_bytes()
    body = data[-18:-1] + b"\x09"
    path.write_bytes(data[:-22] + zlib.crc32(body).to_bytes(4, "little") + body)
    with pytest.raises(BadTrace, match="record 1: expert 9 does not exist"):
        list(read_native(path))


@pytest.mark.parametrize("content", [b"", b"MOETRACE", b"PK\x03\x04 something else", b"MOETRACE\x05\0\0\0\x81\xa1"])
def test_other_files_are_not_traces_of_ours(tmp_path, content):
    (tmp_path / "t").write_bytes(content)
    with pytest.raises(BadTrace, match="header"):
        list(read_native(tmp_path / "t"))


def test_another_version_is_refused(tmp_path):
    write(tmp_path / "t", header=Header("toy", "d", 8, (1,), version=2))
    with pytest.raises(BadTrace, match="version 2, this program reads 1"):
        read_header(tmp_path / "t")


def megatron(**changes):
    record = {"step": 4, "stage": "pre_dispatch", "block": "decoder", "layer": 3, "rank": 0, "num_tokens": 2, "topk": 2}
    return json.dumps({**record, "top_indices": [[12, 45], [7, 0]], **changes})


def test_megatron_s_lines_are_read_without_those_of_multi_token_prediction(tmp_path):
    (tmp_path / "t").write_text("\n".join([megatron(), megatron(block="mtp", mtp_idx=0), megatron(step=5)]) + "\n")
    read = list(open_trace(tmp_path / "t"))
    assert [(e.layer, e.step, e.ids.tolist()) for e in read] == [(3, s, [[12, 45], [7, 0]]) for s in (4, 5)]


def test_megatron_s_older_lines_have_no_block(tmp_path):
    record = {"step": 0, "layer": 1, "rank": 0, "num_tokens": 0, "topk": 2, "top_indices": []}
    (tmp_path / "t").write_text(json.dumps(record) + "\n")
    assert next(read_megatron(tmp_path / "t")).ids.shape == (0, 2)


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        (megatron()[:-20], "line 2: the file is cut off"),
        ("{]\n", "line 2: not JSON"),
        ("[1, 2]\n", "line 2: not a JSON object"),
        ('{"hello": 1}\n', "line 2: no 'layer'"),
        (megatron(num_tokens=3), r"line 2: top_indices are not whole numbers \[3, 2\]"),
        (megatron(top_indices=[[1, 2], [3]]), "line 2: top_indices are not a matrix"),
        (megatron(top_indices=[[1, 2], [3, 0.5]]), "line 2: top_indices are not whole numbers"),
        (megatron(top_indices=[[1, 2], [3, -1]]), "line 2: expert -1 does not exist"),
        (megatron(layer="three"), "line 2: layer, step"),
    ],
)
def test_megatron_s_bad_lines_are_refused_by_number(tmp_path, line, problem):
    (tmp_path / "t").write_text(megatron() + "\n" + line)
    with pytest.raises(BadTrace, match=problem):
        list(read_megatron(tmp_path / "t"))


def npy(array: np.ndarray) -> bytes:
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()


@pytest.mark.parametrize("encode", [lambda b: b, base64.b64encode, lambda b: b'"' + base64.b64encode(b) + b'"\n'])
def test_vllm_s_arrays_are_read_token_by_token(tmp_path, encode):
    table = np.array([[[0, 1], [2, 3]], [[4, 5], [6, 7]]], np.int16)
    (tmp_path / "t").write_bytes(encode(npy(table)))
    read = list(open_trace(tmp_path / "t"))
    assert [(e.step, e.layer, e.ids.tolist()) for e in read] == [
        (0, 0, [[0, 1]]), (0, 1, [[2, 3]]), (1, 0, [[4, 5]]), (1, 1, [[6, 7]]),
    ]  # fmt: skip
    assert [e.layer for e in read_vllm(tmp_path / "t", layers=[5, 9])] == [5, 9, 5, 9]


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (npy(np.zeros((2, 3), np.int16)), "2 dimensions"),
        (npy(np.zeros((2, 3, 1), np.int16))[:-1], "cut off"),
        (b"hello\n", "neither an .npy file nor base64"),
        (npy(np.array([[[0, 1]], [[1, 1]]])), "record 2, layer 0: a row names an expert twice"),
        (npy(np.array([[[0, 1]], [[1, -1]]])), "record 2, layer 0: expert -1"),
        (npy(np.array([[[0.5, 1]]])), "record 1, layer 0: expert ids must be whole"),
        (npy(np.array([[["a"]]])), "not an array of numbers"),
    ],
)
def test_vllm_s_bad_arrays_are_refused(tmp_path, content, problem):
    (tmp_path / "t").write_bytes(content)
    with pytest.raises(BadTrace, match=problem):
        list(read_vllm(tmp_path / "t"))


@pytest.mark.parametrize("text", ["[[1, 2, 3], [4, 5, 6]]", "[1, 2, 3]\n[4, 5, 6]\n"])
def test_counts_are_read_from_json(tmp_path, text):
    (tmp_path / "c.json").write_text(text)
    assert read_counts(tmp_path / "c.json").tolist() == [[1, 2, 3], [4, 5, 6]]


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("[1, 2]\n[3, 4", "line 2: not JSON"),
        ("[1, 2]\n[3]", "line 2: not a row of 2 counts"),
        ("[[1, 2], [3, -4]]", "record 2: counts must be"),
        ("{}", "line 1: not a row"),
        ("[]", "shape"),
    ],
)
def test_bad_counts_are_refused_by_line(tmp_path, text, problem):
    (tmp_path / "c.json").write_text(text)
    with pytest.raises(BadTrace, match=problem):
        read_counts(tmp_path / "c.json")


def test_counts_of_a_trace_are_what_eplb_takes(tmp_path):
    path = write(tmp_path / "t", (1, 0, rows_of([0, 1], [1, 2])), (3, 0, rows_of([7, 1])))
    counts = expert_counts(open_trace(path), [1, 3], 8)
    np.save(tmp_path / "c.npy", counts)
    assert read_counts(tmp_path / "c.npy").tolist() == [[1, 2, 1, 0, 0, 0, 0, 0], [0, 1, 0, 0, 0, 0, 0, 1]]


def test_a_trace_of_dummy_passes_is_warned_about(tmp_path, caplog):
    rng = np.random.default_rng(0)
    real = np.argsort(rng.random((400, 8)), axis=1)[:, :3]
    header = Header("toy", "d", 8, (1, 3))
    clean = write(tmp_path / "clean", (1, 0, real), header=header)
    dummy = write(tmp_path / "dummy", (1, 0, real), (3, 0, np.tile([2, 0, 5], (60, 1))), (3, 1, real), header=header)
    with caplog.at_level(logging.WARNING):
        load_trace(clean)
    assert not caplog.records
    with caplog.at_level(logging.WARNING):
        assert len(load_trace(dummy)) == 3
    assert "of 460 rows of layer 3 chose the same experts [0, 2, 5]" in caplog.text
