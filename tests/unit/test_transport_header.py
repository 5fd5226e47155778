"""The wire format: headers survive a round trip, everything else is refused, addresses cannot be damaged unnoticed."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from shared.errors import BadFrame, TransportError
from shared.transport.address import seal, unseal
from shared.transport.base import DTYPES, HEADER, HEADER_BYTES, FrameKind, Header, body_offset
from shared.transport.buffers import Block

u16, u32, u64 = (st.integers(0, (1 << bits) - 1) for bits in (16, 32, 64))
headers = st.builds(
    Header,
    kind=u16,
    mesh=u64,
    sender=u64,
    sequence=u64,
    attempt=u32,
    epoch=u64,
    group=u64,
    placement=u64,
    live=u64,
    layer=u32,
    rows=u32,
    columns=u32,
    dtype=st.integers(0, len(DTYPES) - 1),
    flags=u32,
    meta_bytes=u32,
    digest=u64,
    trace_id=st.binary(min_size=16, max_size=16),
    span_id=st.binary(min_size=8, max_size=8),
    sent=u32,
)


@given(headers)
def test_a_header_survives_the_wire(header: Header):
    buffer = np.zeros(HEADER_BYTES, np.uint8)
    header.pack_into(buffer)
    assert Header.unpack_from(buffer) == header


def test_a_header_has_its_documented_size():
    assert Header.LAYOUT.size == HEADER_BYTES == 128


@given(st.binary(max_size=200))
def test_bytes_that_are_no_header_are_refused(data: bytes):
    with pytest.raises(BadFrame):
        Header.unpack_from(np.frombuffer(data, np.uint8))


@pytest.mark.parametrize("position, value", [(0, 0), (4, 9), (84, 7)])
def test_another_magic_version_or_dtype_is_refused(position: int, value: int):
    buffer = np.zeros(HEADER_BYTES, np.uint8)
    Header(FrameKind.HELLO, 1, 2, 3).pack_into(buffer)
    buffer[position] = value
    with pytest.raises(BadFrame):
        Header.unpack_from(buffer)


@given(headers)
def test_a_header_that_claims_more_than_the_buffer_holds_is_refused(header: Header):
    block = Block(4096)
    header.pack_into(block.bytes)
    if header.frame_bytes > block.capacity:
        with pytest.raises(BadFrame):
            block.open()
    else:
        block.lay_out_as(block.open()[0])


@given(st.integers(0, 1 << 40))
def test_rows_begin_on_a_64_byte_line_right_after_the_meta(meta_bytes: int):
    offset = body_offset(meta_bytes)
    assert offset % 64 == 0
    assert 0 <= offset - HEADER_BYTES - meta_bytes < 64


@given(st.binary(min_size=1, max_size=300), st.data())
def test_a_damaged_address_is_refused(worker: bytes, data: st.DataObject):
    address = bytearray(seal(worker))
    assert unseal(bytes(address)) == worker
    address[data.draw(st.integers(0, len(address) - 1))] ^= data.draw(st.integers(1, 255))
    with pytest.raises(TransportError):
        unseal(bytes(address))


@given(headers)
def test_compiled_code_reads_the_same_header(header: Header):
    buffer = np.zeros(HEADER_BYTES, np.uint8)
    header.pack_into(buffer)
    (read,) = buffer.view(HEADER)
    names = [name for name in HEADER.names or () if name in Header.__slots__]
    assert len(names) == 17
    assert {name: int(read[name]) for name in names} == {name: getattr(header, name) for name in names}
    assert read["trace"].tobytes() == header.trace_id + header.span_id
