"""Seconds of an exchange by its way: what each way sends, and which one is cheapest where."""

import numpy as np
import pytest

from shared.planning.exchange import OURS, Fabric, Traffic, Way, cheapest, seconds
from shared.planning.hardware import Link

INSIDE = Link("inside", "", 100e9, 1e-6, 0.5e-6)
BETWEEN = Link("between", "", 10e9, 10e-6, 2e-6, per_device=False)
OWN = BETWEEN.__class__("own", "", 10e9, 10e-6, 2e-6)
FABRIC = Fabric(INSIDE, BETWEEN, per_node=8, share=1.0, routes_s=5e-6)


def arrays(*values: float) -> np.ndarray:
    return np.array(values, np.float64)


def traffic(rows: float, top_k: int = 2) -> Traffic:
    return Traffic(arrays(rows), top_k, row_bytes=1000.0, sum_bytes=2000.0)


def way_of(fabric: Fabric, attention: float, experts: float, rows: float) -> Way:
    _, best = cheapest(fabric, arrays(attention), arrays(experts), traffic(rows))
    return OURS[int(best[0])]


def test_in_one_phase_every_member_sends_its_rows_to_every_instance() -> None:
    took = seconds(Way("one", "experts"), FABRIC, arrays(1), arrays(8), traffic(100))
    there = 10e-6 + 8 * 2e-6 + 8 * 100 * 1000 / 10e9
    back = 10e-6 + 1 * 2e-6 + 8 * 100 * 2000 / 10e9
    assert took == pytest.approx(there + back)


def test_a_relay_gets_the_rows_once_for_its_node_and_reduces_sums_there() -> None:
    took = seconds(Way("relay", "experts"), FABRIC, arrays(1), arrays(8), traffic(100))
    far = 2 * 10e-6 + 2 * 2e-6 + 100 * 3000 / 10e9
    inside = 2 * (1e-6 + 7 * 0.5e-6) + 100 * 3000 / 100e9
    assert took == pytest.approx(far + inside)


def test_adapters_of_all_devices_carry_a_share_of_what_goes_from_node_to_node() -> None:
    one, own = (
        seconds(Way("relay", "experts"), FABRIC._replace(between=link), arrays(4), arrays(8), traffic(10_000))[0]
        for link in (BETWEEN, OWN)
    )
    assert one - own == pytest.approx(0.75 * 10_000 * 3000 / 10e9)


def test_members_give_their_rows_to_the_leader_before_it_sends() -> None:
    alone, four = (seconds(Way("direct", "experts"), FABRIC, arrays(n), arrays(8), traffic(100))[0] for n in (1, 4))
    gathering = 2 * (1e-6 + 3 * 0.5e-6) + 75 * 3000 / 100e9
    assert four - alone == pytest.approx(gathering)


def test_where_attention_gates_rows_go_only_where_they_are_needed() -> None:
    all_rows = seconds(Way("direct", "experts"), FABRIC, arrays(1), arrays(16), traffic(10_000))
    needed = seconds(Way("direct", "attention"), FABRIC, arrays(1), arrays(16), traffic(10_000))
    assert needed < 0.2 * all_rows


def test_pools_that_share_a_node_use_its_link_unless_they_are_kept_apart() -> None:
    together, apart = (
        cheapest(FABRIC._replace(apart=flag), arrays(2), arrays(6), traffic(100))[0] for flag in (False, True)
    )
    assert together < 0.5 * apart
    larger = [cheapest(FABRIC._replace(apart=flag), arrays(3), arrays(6), traffic(100))[0] for flag in (False, True)]
    assert larger[0] == larger[1]


def test_two_phases_win_with_many_instances_and_one_with_a_single_one() -> None:
    assert way_of(FABRIC._replace(apart=True), 8, 32, 64).phase == "relay"
    assert way_of(FABRIC._replace(apart=True), 1, 1, 64).phase in ("one", "direct")


def test_gating_on_the_attention_side_wins_where_bytes_count() -> None:
    slow = FABRIC._replace(between=BETWEEN.__class__("slow", "", 1e9, 10e-6, 2e-6), apart=True)
    assert way_of(slow, 2, 32, 2000).gate == "attention"
    assert way_of(slow, 2, 8, 8).gate == "experts"


def test_all_candidates_are_computed_at_once_as_alone() -> None:
    attention, experts = arrays(1, 2, 9, 3), arrays(6, 6, 20, 64)
    at_once, _ = cheapest(FABRIC, attention, experts, Traffic(arrays(1, 10, 100, 1000), 2, 1000.0, 2000.0))
    alone = [
        cheapest(FABRIC, arrays(a), arrays(e), traffic(rows))[0][0]
        for a, e, rows in zip(attention, experts, (1, 10, 100, 1000), strict=True)
    ]
    assert at_once.tolist() == pytest.approx(alone)
