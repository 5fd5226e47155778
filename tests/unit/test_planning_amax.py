"""Tables of a_max: what Monte Carlo counts, the bound beside it, files, and traces that do not fit."""

from pathlib import Path

import numpy as np
import pytest

from shared.errors import ConfigError
from shared.planning.amax import (
    BATCHES,
    bound,
    bound_table,
    homes_for,
    instances_grid,
    load,
    mean_a_max,
    monte_carlo,
    sample,
    save,
    tidy,
)
from shared.planning.routing import Routing, draw, recorded, synthetic, zipf
from shared.scheduling.policies import Policy
from shared.traces.native import Header, TraceWriter
from shared.traces.records import BadTrace

EXPERTS, TOP_K = 16, 2


def uniform() -> Routing:
    return synthetic(EXPERTS, TOP_K, 0.0)


def test_rows_that_choose_the_same_experts_activate_them_once_and_spread_them() -> None:
    routing = Routing("the same", 4, (0,), (np.tile(np.array([0, 1], np.int32), (200, 1)),))
    table = monte_carlo(routing, slots=2, most=4)
    assert table.first == 2
    assert (table.values == 1).all()
    assert (monte_carlo(routing, slots=4, most=1).values == 2).all()


def test_a_row_activates_its_experts_and_many_rows_all_of_them() -> None:
    table = monte_carlo(uniform(), slots=4, most=4)
    one, all_of_them = table.look(np.array([4.0, 4.0]), np.array([1.0, 4096.0]))[0]
    assert 1 <= one <= TOP_K
    assert all_of_them == 4


def test_more_rows_activate_more_but_not_more_per_row_and_more_instances_share_it() -> None:
    values = monte_carlo(synthetic(EXPERTS, TOP_K, 1.0), slots=6, most=12).values
    assert (np.diff(values, axis=2) >= 0).all()
    assert (np.diff(values / np.array(BATCHES), axis=2) <= 1e-12).all()
    assert (np.diff(values, axis=1) <= 0).all()


def test_the_same_seed_gives_the_same_table() -> None:
    first, again = (monte_carlo(uniform(), slots=6, most=5, seed=3).values for _ in range(2))
    assert (first == again).all()


def test_between_rows_of_the_table_lies_a_line() -> None:
    table = bound_table(EXPERTS, TOP_K, slots=4, most=8)
    low, middle, high = table.look(np.array([6.0, 6.0, 6.0]), np.array([4.0, 6.0, 8.0]))[0]
    assert middle == pytest.approx((low + high) / 2)
    assert table.look(np.array([6.0]), np.array([1e6]))[0] == table.values[0, 6 - table.first, -1]


def test_the_bound_holds_for_experts_that_are_all_alike() -> None:
    table = monte_carlo(synthetic(160, 6, 0.0), slots=27, most=8)
    rows = np.array([16.0, 64.0, 256.0])
    for instances in (6.0, 8.0):
        limit = bound(160, 6, np.full(3, instances), rows)
        counted = table.look(np.full(3, instances), rows)[0]
        assert (counted <= limit + 0.5).all()
        assert (limit[1:] - counted[1:] <= 4).all()


def test_activation_scheduling_activates_fewer_than_drawing_or_splitting_tokens() -> None:
    routing = synthetic(64, 4, 0.8)
    balanced, drawn, split = (
        monte_carlo(routing, 12, 12, policy).look(np.array([12.0]), np.array([32.0]))[0, 0]
        for policy in (Policy.ACTIVATED, Policy.RANDOM, Policy.TOKENS)
    )
    assert balanced < drawn < split


def test_without_replicas_experts_lie_in_order() -> None:
    homes = homes_for(Policy.FIRST, [], 8, 4, 8)
    assert homes.tolist() == [1, 1, 2, 2, 4, 4, 8, 8]
    everything = np.arange(8, dtype=np.int32)[None]
    assert mean_a_max([everything], homes, 4, Policy.FIRST) == 2


def test_every_number_of_instances_up_to_the_last_is_in_the_table() -> None:
    grid = instances_grid(6, 64)
    assert grid[:4] == [6, 7, 8, 9]
    assert grid[-1] == 64
    assert monte_carlo(uniform(), slots=4, most=30).most == 30
    with pytest.raises(ValueError, match="3 instances with 4 slots cannot hold 16 experts"):
        monte_carlo(uniform(), slots=4, most=3)


def test_noise_goes_and_what_is_smooth_stays() -> None:
    rows = np.array([1.0, 2.0, 4.0])
    assert tidy(np.array([[[2.0, 5.0, 3.0]]]), rows).tolist() == [[[2.0, 4.0, 5.0]]]
    assert tidy(np.array([[[2.0, 3.0, 5.0]]]), rows).tolist() == [[[2.0, 3.0, 5.0]]]


def test_layers_of_the_table_stand_for_all_layers_of_the_model() -> None:
    ids = draw(zipf(8, 0.5, np.random.default_rng(0)), 2, 200, np.random.default_rng(1))
    table = monte_carlo(Routing("two layers", 8, (1, 3), (ids, ids)), slots=8, most=2)
    assert table.weights(5).tolist() == [3, 2]


def test_a_table_is_read_as_it_was_written(tmp_path: Path) -> None:
    table = monte_carlo(uniform(), slots=6, most=5)
    save(table, tmp_path / "new" / "tables.npz")
    again = load(tmp_path / "new" / "tables.npz")
    assert (again.values == table.values).all()
    assert (again.about, again.policy, again.slots, again.first) == (table.about, "activated", 6, 3)
    assert (again.experts, again.top_k) == (16, table.top_k)
    (tmp_path / "text").write_text("no table")
    with pytest.raises(ConfigError, match=r"--tables: .*text: not a table of a_max"):
        load(tmp_path / "text")


def written(path: Path, experts: int, layers: dict[int, np.ndarray]) -> Path:
    with TraceWriter(path, Header("toy", "", experts, tuple(layers))) as writer:
        for layer, ids in layers.items():
            writer.append(layer, 0, ids)
    return path


def test_a_trace_gives_the_rows_of_every_layer(tmp_path: Path) -> None:
    ids = draw(np.full(8, 1 / 8), 2, 100, np.random.default_rng(0))
    routing = recorded(written(tmp_path / "a.trace", 8, {1: ids, 2: ids[::-1]}), 8, 2)
    assert routing.layers == (1, 2)
    assert (routing.rows[1] == ids[::-1]).all()


@pytest.mark.parametrize(
    ("rows", "experts", "top_k", "problem"),
    [
        (100, 9, 2, "header: 8 experts, but the model has 9"),
        (100, 8, 3, "layer 1: rows choose 2 experts, in the model 3"),
        (40, 8, 2, "layer 1: 40 rows: tables need at least 64"),
    ],
)
def test_a_trace_of_another_model_is_refused(tmp_path: Path, rows: int, experts: int, top_k: int, problem: str) -> None:
    ids = draw(np.full(8, 1 / 8), 2, rows, np.random.default_rng(0))
    with pytest.raises(BadTrace, match=problem):
        recorded(written(tmp_path / "a.trace", 8, {1: ids}), experts, top_k)


def test_rows_of_an_exchange_are_drawn_from_all() -> None:
    rows = np.arange(200, dtype=np.int32)[:, None]
    drawn = sample(rows, 150, np.random.default_rng(0))
    assert drawn.shape == (150, 1)
    assert drawn.max() > 100 and len(np.unique(drawn)) > 75
