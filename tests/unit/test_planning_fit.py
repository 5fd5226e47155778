"""Coefficients from measured steps: those that made the steps are found again, and none is negative."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shared.planning.exchange import Measured
from shared.planning.fit import Point, fit, least
from shared.planning.fitted_file import BadProfile, load_fitted, save_fitted
from tests.unit.fitted_cases import MODEL, SHAPES, TRUE, points, seconds


def test_the_coefficients_that_made_the_steps_are_found_again() -> None:
    found = fit(points(TRUE), MODEL)
    assert (found.most_attention, found.most_experts) == (4, 8)
    assert found.exchange == pytest.approx(TRUE.exchange, rel=1e-3)
    for name in vars(TRUE).keys() - {"sizes", "paced", "exchange"}:
        assert getattr(found, name) == pytest.approx(getattr(TRUE, name), rel=1e-3), name


def test_the_least_time_of_attention_is_told_apart_from_what_a_step_costs_once() -> None:
    slow = replace(TRUE, floor_s=8e-3, step_s=5e-3)
    found = fit(points(slow), MODEL)
    assert (found.floor_s, found.step_s) == pytest.approx((8e-3, 5e-3), rel=1e-3)


def test_steps_without_such_a_least_time_are_fitted_as_well() -> None:
    bare = replace(TRUE, floor_s=0.0, row_s=0.0)
    found, made = fit(points(bare), MODEL), points(bare)
    told = [seconds(found, *shape, a_max=p.a_max) for shape, p in zip(SHAPES, made, strict=True)]
    assert told == pytest.approx([p.step_s for p in made], rel=1e-3)


@settings(max_examples=5, deadline=None)
@given(st.integers(0, 1000))
def test_noise_moves_predictions_little(seed: int) -> None:
    found, made = fit(points(TRUE, noise=0.05, seed=seed), MODEL), points(TRUE)
    told = np.array([seconds(found, *shape, a_max=p.a_max) for shape, p in zip(SHAPES, made, strict=True)])
    assert np.median(np.abs(told / [p.step_s for p in made] - 1)) < 0.06


def test_an_exchange_waits_for_the_busiest_instance() -> None:
    """Uneven experts must not look like a cost of the exchange itself."""
    uneven = []
    for p in points(TRUE):
        longer = 2 * TRUE.expert_s[p.experts]
        step_s = p.step_s + len(MODEL.moe_layers) * longer
        uneven.append(replace(p, a_max=p.a_max + 2, exchange_s=p.exchange_s + longer, step_s=step_s))
    assert fit(uneven, MODEL).exchange == pytest.approx(TRUE.exchange, rel=1e-3)


def test_nothing_is_negative_where_a_straight_fit_would_be() -> None:
    values, falling = np.array([1.0, 2, 3]), np.array([3.0, 2, 1])
    assert min(least(values, [np.ones(3), falling], values)) >= 0


def test_too_few_points_are_refused() -> None:
    with pytest.raises(ValueError, match="3 points are too few"):
        fit(points(TRUE)[:3], MODEL)


def test_a_profile_is_read_as_it_was_written_and_refused_for_another_model(tmp_path: Path) -> None:
    file, made = tmp_path / "here.json", points(TRUE)
    save_fitted(file, replace(TRUE, paced="slow"), made, "abc")
    fitted, again = load_fitted(file, "abc")
    assert (fitted, again) == (replace(TRUE, paced="slow"), made)
    assert isinstance(fitted.exchange, Measured) and isinstance(again[0], Point)
    with pytest.raises(BadProfile, match="fitted to bench-1b, another model: run `moemesh profile`"):
        load_fitted(file, "def")
    file.write_text(file.read_text().replace('"version": 2', '"version": 1'))
    with pytest.raises(BadProfile, match="version 1, this program reads 2"):
        load_fitted(file, "abc")
    file.write_text("{}")
    with pytest.raises(BadProfile, match="no profile of `moemesh profile`"):
        load_fitted(file, "abc")
