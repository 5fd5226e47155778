"""The three forms of cost, beside a computation by hand."""

import pytest

from shared.elastic.cost import CostMeter, Integral


def test_the_forms_charge_for_different_things() -> None:
    meter = CostMeter(misc_bytes=3)
    meter.provide(1000, now=0)
    meter.hold(400, now=0)
    meter.layer(0.5, held_bytes=100, misc_s=0.1)
    meter.layer(0.25, held_bytes=200, misc_s=0.1)
    meter.hold(100, now=6)
    cost = meter.read(now=10)
    assert cost.proxy == pytest.approx(0.5 * 100 + 0.25 * 200 + 0.2 * 3)
    assert cost.resident == pytest.approx(400 * 6 + 100 * 4 + 0.2 * 3)
    assert cost.provisioned == pytest.approx(1000 * 10)


def test_reading_changes_nothing_and_time_only_goes_on() -> None:
    held = Integral()
    assert held.until(7) == 0
    held.set(2, now=1)
    assert held.until(4) == held.until(4) == 6
    with pytest.raises(ValueError, match="time goes backwards"):
        held.set(1, now=0)


def test_idle_time_costs_the_proxy_nothing() -> None:
    meter = CostMeter()
    meter.hold(50, now=0)
    assert meter.read(100).proxy == 0
    assert meter.read(100).resident == 5000
