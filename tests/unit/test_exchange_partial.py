"""The partial combine: sums instead of parts, the same numbers to rounding, and nothing missing or doubled."""

import itertools
from typing import Any

import numpy as np
import pytest
import torch

from services.attention import groups
from services.attention.ways import Gate, Phase
from services.experts.answers import Refused
from shared.errors import BadFrame
from shared.exchange_frames import SUMS, Flag, read_segments
from shared.transport.base import FrameKind, Header
from shared.transport.faults import Faults, Rates
from shared.transport.memory import MemoryNetwork
from tests.unit.toy_elastic import elastic_with
from tests.unit.toy_experts import (
    HIDDEN,
    LAYERS,
    MESH,
    ToyMesh,
    everywhere,
    make_placement,
    random_rows,
    round_robin,
    toy_mesh,
)
from tests.unit.toy_groups import group_mesh, undisturbed

WAYS = list(itertools.product(Phase, Gate))


def check(mesh: ToyMesh, seed: int, rows: int) -> None:
    """One exchange gives what a single process computes, to rounding."""
    hidden, x = random_rows(seed, rows), random_rows(seed + 1, rows)
    expected = mesh.layers[LAYERS[0]].local(hidden, x)
    torch.testing.assert_close(mesh.run(LAYERS[0], hidden, x), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("homes", [everywhere(1), round_robin(2), everywhere(3)], ids=["one", "apart", "all"])
def test_sums_are_the_parts_to_rounding(homes: list[list[int]]) -> None:
    with toy_mesh(homes, partial=True) as mesh:
        for seed in range(20):
            check(mesh, seed, rows=1 + seed)
        assert mesh.exchange.stats().repeats.total() == 0


@pytest.mark.parametrize(("phase", "gate"), WAYS)
@pytest.mark.parametrize("rows", [(3,), (1, 7, 4)], ids=str)
def test_sums_come_every_way(phase: Phase, gate: Gate, rows: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(groups, "SHORTEST_WAIT_S", 0.5)
    monkeypatch.setattr(groups, "LONGEST_WAIT_S", 0.5)
    with group_mesh(len(rows), ("x", "x", "y", "y"), phase, gate, partial=True) as mesh:
        assert mesh.steps(rows, 4) == [None] * len(rows)
        assert all(undisturbed(member.exchange.stats()) for member in mesh.members)


def test_the_same_rows_give_the_same_bytes_again() -> None:
    with toy_mesh(everywhere(3), partial=True) as mesh:
        hidden, x = random_rows(0, 16), random_rows(1, 16)
        assert len({mesh.run(LAYERS[0], hidden, x).numpy().tobytes() for _ in range(10)}) == 1


def test_sums_take_fewer_bytes_than_parts() -> None:
    received = []
    for partial in (False, True):
        with toy_mesh(everywhere(2), partial=partial) as mesh:
            for seed in range(10):
                check(mesh, seed, rows=32)
            received.append(mesh.exchange.stats().bytes_received)
    assert received[1] < 0.9 * received[0]


def test_lost_late_and_doubled_frames_lose_no_part_and_add_none_twice() -> None:
    network = MemoryNetwork(
        Faults(7, dict.fromkeys((FrameKind.DISPATCH, FrameKind.COMBINE), Rates(drop=0.05, duplicate=0.1, delay=0.1)))
    )
    with toy_mesh(everywhere(3), network, partial=True) as mesh:
        for seed in range(60):
            check(mesh, seed, rows=1 + seed % 7)
        assert mesh.exchange.stats().repeats.total() > 0


def test_experts_that_come_and_go_answer_with_sums_too() -> None:
    options: dict[str, Any] = {"deadline": 20.0, "give_up": 60.0}
    with toy_mesh(round_robin(2), make_elastic=elastic_with(2), partial=True, **options) as mesh:
        for seed in range(12):
            check(mesh, seed, rows=9)


def test_an_instance_that_the_placement_does_not_name_refuses_and_lives_on() -> None:
    with toy_mesh(everywhere(2), partial=True) as mesh:
        stranger = make_placement(everywhere(2), ["x", "y"], version=2)
        mesh.adopt(mesh.placement, stranger)
        known = mesh.instances[0].server._placements[2]
        assert known.instance < 0
        header = Header(
            FrameKind.DISPATCH, MESH, 900, 1, placement=2, layer=LAYERS[0], columns=HIDDEN, flags=Flag.PARTIAL
        )
        with pytest.raises(Refused, match="no homes here"):
            mesh.instances[0].server._judge(header)


def test_sums_of_nobody_are_malformed() -> None:
    header = Header(FrameKind.COMBINE, MESH, 1, 1, flags=SUMS)
    with pytest.raises(BadFrame, match="without a segment"):
        read_segments(header, np.zeros(8, np.uint8), 0)


def test_an_exchange_without_rows_is_answered() -> None:
    with toy_mesh(everywhere(2), partial=True) as mesh:
        assert mesh.run(LAYERS[0], random_rows(0, 0), random_rows(1, 0)).shape == (0, np.shape(random_rows(0, 0))[1])
