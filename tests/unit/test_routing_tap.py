"""What exchanges activate is remembered as masks, sampled when there are many; ids only while somebody wants them."""

import io
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from services.attention import groups, recording
from services.attention.activations import ActivationRing
from services.attention.recording import Recording
from services.attention.tap import RoutingTap
from services.attention.ways import Gate, Phase
from shared.traces.native import Header, read_records
from tests.unit.toy_experts import EXPERTS, LAYERS, TOP_K, everywhere, random_rows, round_robin, toy_mesh
from tests.unit.toy_groups import group_mesh


def chosen(*rows: list[int]) -> np.ndarray:
    return np.array(rows, np.uint32)


def experts_of(mask: np.ndarray) -> set[int]:
    return {e for e in range(64 * len(mask)) if int(mask[e // 64]) >> e % 64 & 1}


@settings(deadline=None)
@given(
    experts=st.sampled_from([1, 63, 64, 65, 160, 256]),
    rounds=st.lists(st.lists(st.integers(0, 2**32), max_size=12), max_size=4),
)
def test_a_ring_gives_the_latest_exchanges_once_and_in_order(experts: int, rounds: list[list[int]]) -> None:
    ring = ActivationRing((3, 5), experts, kept=8)
    for seeds in rounds:
        added = []
        for seed in seeds:
            rng = np.random.default_rng(seed)
            rows = np.sort([rng.permutation(experts)[:6] for _ in range(rng.integers(1, 5))]).astype(np.uint32)
            ring.mark(5, rows)
            added.append(rows)
        assert ring.take(3) is None
        latest = ring.take(5)
        if not added:
            assert latest is None
            continue
        assert latest is not None
        assert [experts_of(mask) for mask in latest.masks] == [set(rows.ravel().tolist()) for rows in added[-8:]]
        assert latest.rows == sum(map(len, added[-8:]))


def test_masks_of_very_many_experts_still_fit_in_a_message() -> None:
    ring = ActivationRing((0,), 1 << 16)
    for _ in range(300):
        ring.mark(0, chosen([0, 65535]))
    latest = ring.take(0)
    assert latest is not None
    assert 0 < latest.masks.nbytes < 400_000
    assert experts_of(latest.masks[0]) == {0, 65535}


def test_what_is_written_over_while_it_is_read_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    ring = ActivationRing((0,), 8, kept=4)
    for e in range(4):
        ring.mark(0, chosen([e]))
    arange = np.arange

    def interrupted(*bounds: int) -> np.ndarray:
        ring.mark(0, chosen([7]))
        return arange(*bounds)

    monkeypatch.setattr(np, "arange", interrupted)
    latest = ring.take(0)
    assert latest is not None
    assert [experts_of(mask) for mask in latest.masks] == [{1}, {2}, {3}]


# ---- recording ----------------------------------------------------------------------------------------------


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


def read(records: bytes, experts: int = EXPERTS) -> list[tuple[int, int, list[list[int]]]]:
    header = Header("m", "", experts, LAYERS)
    found = read_records(Path("x"), header, io.BytesIO(records), len(records))
    return [(e.layer, e.step, e.ids.tolist()) for e in found]


def test_nothing_is_kept_before_and_after_a_lease() -> None:
    clock = Clock()
    made = Recording(EXPERTS, clock=clock)
    made.add(1, 1, chosen([0, 1]))
    assert not made.on
    assert made.lease("a", 3.0)
    assert not made.lease("a", 3.0), "a renewal"
    made.add(1, 2, chosen([0, 2]))
    clock.now += 2.9
    assert made.expire() == ()
    assert made.lease("b", 3.0)
    clock.now += 0.2
    assert (made.expire(), made.on) == (("a",), True)
    clock.now += 3.0
    assert (made.expire(), made.on, made.recorders) == (("b",), False, 0)
    made.add(1, 3, chosen([0, 3]))
    records, seen = made.take()
    assert read(records) == [(1, 2, [[0, 2]])]
    assert seen == 1


def test_a_lease_can_be_given_back_and_none_is_made_by_that() -> None:
    made = Recording(EXPERTS)
    assert not made.lease("a", 0.0)
    assert made.expire() == ()
    made.lease("a", 30.0)
    made.lease("a", 0.0)
    assert made.expire() == ("a",)


def test_what_waits_is_bounded_and_what_is_dropped_is_seen() -> None:
    made = Recording(300, most_waiting=1000)
    made.lease("a", 30.0)
    for step in range(50):
        made.add(1, step, np.arange(20, dtype=np.uint32).reshape(10, 2))
    records, seen = made.take()
    kept = read(records, 300)
    assert 0 < len(kept) < 50
    assert len(records) <= 1000
    assert (seen, made.dropped) == (50, 50 - len(kept))
    made.add(1, 50, chosen([1]))
    assert made.take()[1] == 51


def test_messages_stay_small_and_count_only_what_was_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recording, "MOST_AT_ONCE", 100)
    made = Recording(8)
    made.lease("a", 30.0)
    for step in range(6):
        made.add(1, step, chosen([0, 1], [2, 3]))
    made.add(1, 6, np.zeros((200, 1), np.uint32))
    batches = [made.take() for _ in range(4)]
    assert [len(read(records)) for records, _ in batches] == [4, 2, 0, 0]
    assert [seen for _, seen in batches] == [5, 7, 7, 7]  # what was dropped counts at once
    assert all(len(records) <= 100 for records, _ in batches)


# ---- in an exchange -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("homes", [everywhere(2), round_robin(3)], ids=str)
def test_every_exchange_hands_out_what_its_rows_chose(homes: list[list[int]]) -> None:
    tap = RoutingTap(LAYERS, EXPERTS, first=0)
    tap.recording.lease("a", 30.0)
    with toy_mesh(homes, deadline=5.0, tap=tap) as mesh:
        expected = []
        for step, rows in enumerate((5, 1, 7), 1):
            mesh.exchange.begin(rows)
            for layer in LAYERS:
                hidden = random_rows(step + layer, rows)
                mesh.run(layer, hidden, torch.zeros_like(hidden))
                ids = np.sort(mesh.layers[layer].gate(hidden)[1].numpy(), axis=1)
                assert ids.shape == (rows, TOP_K)
                expected.append((layer, step, ids.tolist()))
            mesh.exchange.end()
    assert read(tap.recording.take()[0]) == expected
    for layer in LAYERS:
        latest = tap.ring.take(layer)
        assert latest is not None
        masks = [experts_of(mask) for mask in latest.masks]
        assert masks == [{e for row in ids for e in row} for at, _, ids in expected if at == layer]
        assert latest.rows == 13


def test_steps_have_numbers_of_their_own_and_groups_bring_theirs() -> None:
    tap = RoutingTap(LAYERS, EXPERTS, first=(1 << 64) - 2)
    tap.recording.lease("a", 30.0)
    for group in (0, 77, 0, 0):
        tap.begin(group)
        for layer in LAYERS:
            tap.combined(layer, chosen([0]))
    steps = [step for _, step, _ in read(tap.recording.take()[0])]
    assert steps == [step for step in ((1 << 64) - 1, 77, 1, 2) for _ in LAYERS]


@pytest.mark.parametrize("phase", Phase)
def test_rows_of_a_group_are_recorded_once_and_under_one_step(phase: Phase, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(groups, "SHORTEST_WAIT_S", 0.5)
    monkeypatch.setattr(groups, "LONGEST_WAIT_S", 0.5)
    taps = [RoutingTap(LAYERS, EXPERTS, first=1000 * n) for n in range(2)]
    with group_mesh(2, ("a", "a"), phase, Gate.EXPERTS) as mesh:
        for member, tap in zip(mesh.members, taps, strict=True):
            tap.recording.lease("a", 30.0)
            member.exchange._tap = tap
        assert mesh.steps((5, 2), 4) == [None, None]
        assert mesh.formed
        gates = mesh.instances[0].layers
    records = [record for tap in taps for record in read(tap.recording.take()[0])]
    rows = Counter((layer, tuple(row)) for layer, _, ids in records for row in ids)
    given = [random_rows(100 * step + n, count) for step in range(4) for n, count in enumerate((5, 2))]
    assert rows == Counter(
        (layer, tuple(row)) for layer in LAYERS for hidden in given for row in np.sort(gates[layer].gate(hidden)[1])
    )
    of_step = Counter[int]()
    for layer, step, ids in records:
        of_step[step] += len(ids) * (layer == LAYERS[0])
    assert set(of_step.values()) <= {7, 5, 2}
    assert 7 in of_step.values()
