"""Paced instances: real results, given out only when a device profile's time for that work has passed.

A ``Pace`` waits behind work that is done; what takes how long is in device_profile.py, the link's share of it in
transport/paced.py. An instance is a serial device: its compute thread waits, and does nothing else meanwhile.
"""

import ctypes
import sys
import time
from collections.abc import Callable, Iterator
from typing import Protocol

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from shared.device_profile import (
    DeviceProfile,
    attention_seconds,
    experts_seconds,
    head_seconds,
    shared_seconds,
)
from shared.metrics import Sample, sample

PR_SET_TIMERSLACK = 29


def sleep_exactly() -> None:
    """Let sleeps of this thread end within about 20 us of their time; Linux may add 50 us by default."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_TIMERSLACK, 1)


class Pace(Protocol):
    """Every method returns when the time of some work has passed since ``began``, in ``time.monotonic`` seconds."""

    name: str
    """Of the profile; "" when nothing is paced."""

    def attention(self, began: float, positions: Tensor) -> None:
        """Attention of one layer; positions int [T] of the rows in their sequences."""
        ...

    def shared(self, began: float, rows: int) -> None:
        """Shared experts of one layer."""
        ...

    def head(self, began: float, rows: int) -> None:
        """Logits of so many rows."""
        ...

    def experts(self, began: float, experts: NDArray[np.int32]) -> None:
        """Routed experts of one layer; ``experts``: which one each part is of."""
        ...

    def samples(self) -> Iterator[Sample]:
        """For /metrics; read in another thread."""
        ...


class Unpaced:
    """Work takes as long as it takes."""

    name = ""

    def attention(self, began: float, positions: Tensor) -> None:
        """At once."""

    def shared(self, began: float, rows: int) -> None:
        """At once."""

    def head(self, began: float, rows: int) -> None:
        """At once."""

    def experts(self, began: float, experts: NDArray[np.int32]) -> None:
        """At once."""

    def samples(self) -> Iterator[Sample]:
        return iter(())


UNPACED = Unpaced()


class Pacer:
    """Waits for the times of a profile; belongs to the compute thread.

    Args:
        wait_until: returns at a moment of ``clock``; the transport's, so that frames arrive meanwhile.
    """

    def __init__(
        self, profile: DeviceProfile, wait_until: Callable[[float], None], clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.name = profile.name
        self.modelled = 0.0
        """Seconds that all work took by the profile."""
        self.late = 0.0
        """Seconds that it took longer here: when they are many, this machine is too slow for the profile."""
        self._profile = profile
        self._wait_until = wait_until
        self._clock = clock

    def attention(self, began: float, positions: Tensor) -> None:
        context = positions.sum().item() / len(positions) + 1
        self._wait(began, attention_seconds(self._profile, len(positions), context))

    def shared(self, began: float, rows: int) -> None:
        self._wait(began, shared_seconds(self._profile, rows))

    def head(self, began: float, rows: int) -> None:
        self._wait(began, head_seconds(self._profile, rows))

    def experts(self, began: float, experts: NDArray[np.int32]) -> None:
        self._wait(began, experts_seconds(self._profile, len(np.unique(experts))))

    def samples(self) -> Iterator[Sample]:
        yield sample("paced", 1, profile=self.name)
        yield sample("paced_seconds", self.modelled)
        yield sample("paced_late_seconds", self.late)

    def _wait(self, began: float, seconds: float) -> None:
        if not seconds:
            return  # not modelled: it takes its own time
        self._wait_until(began + seconds)
        self.modelled += seconds
        self.late += max(0.0, self._clock() - began - seconds)
