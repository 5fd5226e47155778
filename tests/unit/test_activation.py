"""What both sides of an exchange agree on: parts, digest, homes, names of meshes."""

from functools import partial

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shared.activation import (
    PARTS,
    Choice,
    NoLiveHome,
    choose_replicas,
    exchange_digest,
    layer_homes,
    mesh_hash,
    own_parts,
    plan_exchange,
    write_parts,
)
from shared.messages import Placement
from tests.unit.exchanges import exchanges


@settings(deadline=None)
@given(exchanges())
def test_own_parts_are_every_choice_once_in_expert_then_row_order(exchange):
    ids, homes, live = exchange
    replicas = choose_replicas(ids, homes, live)
    weights = np.arange(ids.size, dtype=np.float32).reshape(ids.shape)
    seen = []
    for instance in range(6):
        tokens, experts, own = own_parts(ids, replicas, weights, instance)
        parts = list(zip(experts.tolist(), tokens.tolist(), own.tolist(), strict=True))
        assert parts == sorted(parts)
        assert all(replicas[t][ids[t] == e] == instance and weights[t][ids[t] == e] == w for e, t, w in parts)
        seen += parts
    assert sorted(seen) == sorted((ids[t, j], t, weights[t, j]) for t, j in np.ndindex(ids.shape))


@settings(deadline=None)
@given(exchanges(), st.integers(0, 5))
def test_a_plan_in_one_call_is_the_same_choice_parts_and_digest(exchange, instance):
    ids, homes, live = exchange
    weights = np.arange(ids.size, dtype=np.float32).reshape(ids.shape)
    replicas = choose_replicas(ids, homes, live)
    parts, digest = plan_exchange(ids, weights, Choice(homes, live, instance))
    assert digest == exchange_digest(ids, replicas)
    for planned, expected in zip(parts, own_parts(ids, replicas, weights, instance), strict=True):
        assert np.array_equal(planned, expected)


def test_an_expert_without_live_home_is_named():
    ids, homes = np.array([[0, 1]], np.int32), np.array([1, 2], np.uint64)
    weights = np.ones((1, 2), np.float32)
    for choose in (
        partial(choose_replicas, ids, homes, live=0b01),
        partial(plan_exchange, ids, weights, Choice(homes, 0b01, 0)),
    ):
        with pytest.raises(NoLiveHome, match="expert 1 ") as caught:
            choose()
        assert caught.value.expert == 1


def plain_digest(ids: np.ndarray, replicas: np.ndarray) -> int:
    """The digest in Python's integers."""
    prime, mask = 0x100000001B3, (1 << 64) - 1
    h = (0xCBF29CE484222325 ^ ids.shape[1]) * prime & mask
    for e, i in zip(ids.ravel().tolist(), replicas.ravel().tolist(), strict=True):
        h = (h ^ (e << 32 | i)) * prime & mask
        h ^= h >> 32
    h = (h ^ h >> 33) * 0xFF51AFD7ED558CCD & mask
    return h ^ h >> 33


@settings(deadline=None)
@given(exchanges())
def test_digest_is_the_same_in_every_build(exchange):
    """Processes compare digests: its value is part of the wire format."""
    ids, homes, live = exchange
    replicas = choose_replicas(ids, homes, live)
    assert exchange_digest(ids, replicas) == plain_digest(ids, replicas)


@settings(deadline=None)
@given(exchanges(), st.data())
def test_digest_sees_any_change(exchange, data):
    ids, homes, live = exchange
    replicas = choose_replicas(ids, homes, live)
    other_ids, other_replicas = ids.copy(), replicas.copy()
    at = data.draw(st.integers(0, ids.size - 1))
    data.draw(st.sampled_from([other_ids, other_replicas])).ravel()[at] += 1
    assert exchange_digest(ids, replicas) != exchange_digest(other_ids, other_replicas)


def test_parts_are_twelve_bytes_little_endian():
    meta = np.zeros(2 * PARTS.itemsize, np.uint8)
    write_parts(meta, np.array([7, 1], np.int32), np.array([2, 9], np.int32), np.array([0.5, 1], np.float32))
    assert meta.tobytes().hex() == "07000000020000000000003f" + "01000000090000000000803f"


def test_no_parts_need_no_meta():
    nothing = own_parts(np.zeros((1, 1), np.int32), np.zeros((1, 1), np.int32), np.ones((1, 1), np.float32), 5)
    assert [len(array) for array in nothing] == [0, 0, 0]
    write_parts(np.zeros(0, np.uint8), *nothing)


def placement(homes: bytes) -> Placement:
    return Placement(
        version=1, epoch=1, author="a", reason="r", digest="d", instances=("e0", "e1"), moe_layers=(2, 4),
        experts=3, homes=homes,
    )  # fmt: skip


def test_homes_are_found_by_layer_index():
    homes = layer_homes(placement(np.array([1, 2, 3, 3, 2, 1], "<u8").tobytes()))
    assert {layer: masks.tolist() for layer, masks in homes.items()} == {2: [1, 2, 3], 4: [3, 2, 1]}


def test_a_short_table_of_homes_is_refused():
    with pytest.raises(ValueError, match="expected 2 x 3"):
        layer_homes(placement(bytes(40)))


def test_mesh_hash_separates_meshes_and_models():
    names = [mesh_hash(mesh, digest) for mesh in ("a", "ab") for digest in ("b", "")]
    assert len(set(names)) == 4 and all(0 <= name < 1 << 64 for name in names)
