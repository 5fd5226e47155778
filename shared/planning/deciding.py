"""What is decided first, from window to window: which rate to expect, and for how much of it there is a plan. Pure."""

import math
from collections.abc import Callable
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from shared.errors import MoemeshError

Floats = NDArray[np.float64]
P = TypeVar("P")
LEAST_RATE = 1e-3
"""Requests per second."""
LESS = 0.9
"""Where a rate cannot be served within the limits, so much of it is tried next."""
WINDOWS, QUANTILE, HEADROOM = 3, 1.0, 1.1
"""Of ``moving_quantile``, and what a rate is raised by: a jump is answered at once (bench/forecast.py has others)."""


class Unservable(MoemeshError):
    """A system has no plan, whatever the rate."""

    def __init__(self) -> None:
        super().__init__("no plan serves any rate within the limits: allow more time per token, or more instances")


def nearest(choose: Callable[[float], P | None], rate: float) -> P:
    """The plan for a rate, or for the highest of the next lower ones that can be served. Raises Unservable.

    Whatever can be served can be at lower rates too, so that few of them need be tried.
    """
    if (plan := choose(rate)) is not None:
        return plan
    most = max(1, math.ceil(math.log(LEAST_RATE / rate) / math.log(LESS)))
    if (plan := choose(rate * LESS**most)) is None:
        raise Unservable
    least = 0
    while most - least > 1:
        middle = (least + most) // 2
        found = choose(rate * LESS**middle)
        plan, least, most = (plan, middle, most) if found is None else (found, least, middle)
    return plan


def moving_quantile(rates: Floats, windows: int = WINDOWS, quantile: float = QUANTILE) -> float:
    """The next rate after rates [windows], oldest first: a quantile of the last few."""
    return float(np.quantile(rates[-windows:], quantile))
