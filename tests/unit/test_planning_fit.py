"""Coefficients from measured steps: those that made the steps are found again, and none is negative."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shared.planning.fit import Fitted, Point, errors, fit, least

TRUE = Fitted(16, 14, 4, 2e-3, 1e-4, 3e-9, 5e-5, {1: 2e-4, 2: 2.6e-4}, 4e-6, 1e-4, 2e-5, 3e-6)
SHAPES = [(n, b, s) for n in (1, 2) for b in (1, 2, 4, 8, 16, 32) for s in (64, 512)]


def activated(experts: int, batch: int) -> float:
    return 32 * (1 - (1 - 4 / 32) ** batch) / experts


def points(of: Fitted, noise: float = 0.0, seed: int = 0) -> list[Point]:
    rng, made = np.random.default_rng(seed), []
    for n, b, s in SHAPES:
        a = activated(n, b)
        expert = of.experts(n, b, a)
        exchange = expert + of.exchange_s + of.instance_s * n + of.exchange_row_s * b
        step = of.tpot(n, b, s, a)
        made.append(Point(n, b, s, step * (1 + noise * rng.standard_normal()), exchange, expert, a))
    return made


def test_the_coefficients_that_made_the_steps_are_found_again() -> None:
    found = fit(points(TRUE), TRUE.layers, TRUE.moe_layers, TRUE.top_k)
    for name, value in vars(TRUE).items():
        assert getattr(found, name) == pytest.approx(value, rel=1e-3), name


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 1000))
def test_noise_moves_predictions_little(seed: int) -> None:
    measured = points(TRUE, noise=0.05, seed=seed)
    found = fit(measured, TRUE.layers, TRUE.moe_layers, TRUE.top_k)
    off = errors(found, points(TRUE), [activated(n, b) for n, b, _ in SHAPES])
    assert np.median(np.abs(off)) < 0.06


def test_nothing_is_negative_where_a_straight_fit_would_be() -> None:
    values, falling = np.array([1.0, 2, 3]), np.array([3.0, 2, 1])
    assert min(least(values, [np.ones(3), falling], values)) >= 0


def test_too_few_points_are_refused() -> None:
    with pytest.raises(ValueError, match="3 points are too few"):
        fit(points(TRUE)[:3], 16, 14, 4)


def test_instances_between_those_measured_are_on_a_line() -> None:
    assert TRUE.beta(2) == 2.6e-4
    assert TRUE.beta(9) == 2.6e-4
