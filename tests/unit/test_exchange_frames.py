"""Layouts of an exchange's frames: what is written is read again, and whatever else arrives is a BadFrame."""

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from services.experts.assembly import MOST_OPEN, Assemblies
from shared.activation import PARTS
from shared.errors import BadFrame
from shared.exchange_frames import (
    MASK_BYTES,
    SEGMENT,
    Routes,
    Share,
    read_mask,
    read_segments,
    write_mask,
    write_segments,
)
from shared.transport.base import FrameKind, Header

words = st.integers(0, 2**32 - 1)


def meta_of(nbytes: int) -> np.ndarray:
    return np.full(nbytes, 0xAB, np.uint8)


def combine(rows: int, flags: int, meta_bytes: int = 0) -> Header:
    return Header(FrameKind.COMBINE, 1, 2, 3, rows=rows, columns=4, flags=flags, meta_bytes=meta_bytes)


# ---- shares and masks ---------------------------------------------------------------------------------------


@given(words, words, words)
def test_a_share_survives_the_wire(members, first, total):
    meta = meta_of(Share.BYTES + 4)
    Share(members, first, total).write(meta)
    assert Share.read(meta) == (members, first, total)


@given(st.integers(0, 2**64 - 1))
def test_a_mask_survives_the_wire(mask):
    meta = meta_of(MASK_BYTES + 4)
    write_mask(meta, mask)
    assert read_mask(meta) == mask


def test_a_frame_without_the_share_or_mask_that_it_claims_is_bad():
    for nbytes in range(Share.BYTES):
        with pytest.raises(BadFrame):
            Share.read(meta_of(nbytes))
    for nbytes in range(MASK_BYTES):
        with pytest.raises(BadFrame):
            read_mask(meta_of(nbytes))


# ---- routes -------------------------------------------------------------------------------------------------


def routes(rows: int, top_k: int) -> Routes:
    rng = np.random.default_rng(rows)
    numbers, ids, replicas = (rng.integers(0, 64, shape, np.int32) for shape in ((rows,), (rows, top_k), (rows, top_k)))
    return Routes(numbers, ids, replicas, rng.random((rows, top_k), np.float32))


@given(st.integers(0, 20), st.integers(1, 8), st.sampled_from([0, MASK_BYTES]))
def test_routes_survive_the_wire_wherever_they_begin(rows, top_k, skip):
    written, meta = routes(rows, top_k), meta_of(skip + Routes.nbytes(rows, top_k))
    written.write(meta[skip:])
    for mine, theirs in zip(written, Routes.read(meta[skip:], rows, top_k), strict=True):
        assert mine.tobytes() == theirs.tobytes()


@given(st.integers(0, 200), st.integers(0, 2**32 - 1), st.integers(1, 8))
def test_routes_of_another_size_than_their_rows_are_bad(nbytes, rows, top_k):
    if nbytes == Routes.nbytes(rows, top_k):
        return
    with pytest.raises(BadFrame):
        Routes.read(meta_of(nbytes), rows, top_k)


def test_an_instance_gets_the_rows_that_it_computes_and_no_others():
    made = routes(20, 3)._replace(replicas=np.arange(60, dtype=np.int32).reshape(20, 3) % 64)
    some = made.of(1 << 0 | 1 << 4 | 1 << 59)
    assert some.tokens.tolist() == made.tokens[[0, 1, 19]].tolist()
    assert some.replicas.tolist() == [[0, 1, 2], [3, 4, 5], [57, 58, 59]]
    assert made.of(0).ids.shape == (0, 3)
    assert len(made._replace(replicas=np.full((20, 3), 63, np.int32)).of(1 << 63).tokens) == 20


# ---- merged replies -----------------------------------------------------------------------------------------


@given(st.lists(st.tuples(st.integers(0, 63), st.integers(0, 9)), min_size=1, max_size=8), st.integers(0, 30))
def test_segments_survive_the_wire(segments, spare):
    parts = sum(n for _, n in segments)
    meta = meta_of(parts * PARTS.itemsize + spare + len(segments) * SEGMENT.itemsize)
    write_segments(meta, segments)
    assert read_segments(combine(parts, len(segments), len(meta)), meta, 5) == segments


def test_a_plain_reply_is_one_segment_of_its_sender():
    assert read_segments(combine(7, 0), meta_of(0), 5) == [(5, 7)]


@given(st.integers(0, 2**32 - 1), st.integers(1, 2**31 - 1), st.binary(max_size=80))
def test_a_merged_reply_of_any_bytes_is_read_or_bad(rows, flags, data):
    meta = np.frombuffer(data, np.uint8)
    try:
        found = read_segments(combine(rows, flags, len(meta)), meta, 5)
    except BadFrame:
        return
    assert sum(parts for _, parts in found) == rows
    assert all(0 <= instance < 64 for instance, _ in found)


@pytest.mark.parametrize("instance", [64, 2**32 - 1])
def test_a_segment_of_no_instance_is_bad(instance):
    meta = meta_of(2 * PARTS.itemsize + SEGMENT.itemsize)
    write_segments(meta, [(instance, 2)])
    with pytest.raises(BadFrame):
        read_segments(combine(2, 1, len(meta)), meta, 5)


# ---- shares become exchanges --------------------------------------------------------------------------------


def share(sender: int, rows: int, sequence: int = 1, **more: Any) -> Header:
    fields: dict[str, Any] = {"group": 70, "layer": 2, "placement": 1, "live": 3} | more
    return Header(FrameKind.DISPATCH, 1, sender, sequence, rows=rows, columns=4, **fields)


def some_rows(count: int, value: float = 1.0) -> torch.Tensor:
    return torch.full((count, 4), value)


def assemblies() -> Assemblies:
    return Assemblies(torch.float32, 16)


def test_the_last_share_makes_an_exchange_whole_in_whatever_order_they_come():
    made = assemblies()
    assert made.add(share(2, 3), Share(2, 2, 5), some_rows(3, 2.0)) is None
    whole = made.add(share(1, 2), Share(2, 0, 5), some_rows(2, 1.0))
    assert whole is not None
    assert whole.rows[:, 0].tolist() == [1, 1, 2, 2, 2]
    assert whole.firsts == {1: 0, 2: 2}
    assert not made._open


@pytest.mark.parametrize(
    ("rows", "told"),
    [
        (3, Share(2, 3, 5)), (3, Share(2, 0, 0)), (3, Share(2, 0, 17)), (3, Share(2, 2**32 - 1, 5)),
        (0, Share(2, 0, 5)), (3, Share(2, 1, 5)), (3, Share(3, 2, 5)), (3, Share(2, 2, 6)),
    ],
    ids=["past the end", "no rows in all", "too many", "absurd", "none", "overlapping", "members", "total"],
)  # fmt: skip
def test_a_share_that_does_not_fit_is_bad_and_never_makes_an_exchange(rows, told):
    made = assemblies()
    assert made.add(share(1, 2), Share(2, 0, 5), some_rows(2)) is None
    with pytest.raises(BadFrame):
        made.add(share(2, rows), told, some_rows(rows))


@pytest.mark.parametrize("other", [{"placement": 2}, {"live": 1}])
def test_members_that_would_choose_replicas_differently_make_no_exchange(other):
    made = assemblies()
    made.add(share(1, 2), Share(2, 0, 5), some_rows(2))
    with pytest.raises(BadFrame):
        made.add(share(2, 3, **other), Share(2, 2, 5), some_rows(3))


def test_a_late_copy_of_a_share_opens_nothing():
    made = assemblies()
    made.add(share(1, 2), Share(2, 0, 5), some_rows(2))
    assert made.add(share(2, 3), Share(2, 2, 5), some_rows(3))
    assert made.add(share(1, 2), Share(2, 0, 5), some_rows(2)) is None
    assert not made._open


def test_a_member_that_goes_on_gives_up_what_it_was_part_of():
    made = assemblies()
    for number in range(1, 200):
        made.add(share(1, 2, number, layer=number), Share(2, 0, 5), some_rows(2))
    assert len(made._open) == 1
    made.forget(1)
    assert not made._open


def test_memory_is_bounded_however_many_senders_never_finish():
    made = assemblies()
    for sender in range(5 * MOST_OPEN):
        made.add(share(sender, 2, group=sender), Share(2, 0, 5), some_rows(2))
    assert len(made._open) == MOST_OPEN
