"""What residents cost, in three forms that must not be confused: byte-seconds, from events with times, live or not.

* *proxy*, the paper's (MoEless, arXiv 2603.06350, section 3.3): a layer's replicas are charged while that layer runs,
  and nothing else but a constant memory for the rest of its time. What is held between two turns of a layer is free.
* *resident*: all experts in memory at any time, used or idle, and the same constant.
* *provisioned*: the memory of all instances, as long as they exist. What a bill says.
"""

from dataclasses import dataclass


@dataclass
class Integral:
    """A quantity that changes at known times, integrated over time."""

    level: float = 0.0
    total: float = 0.0
    since: float | None = None
    """None: nothing is known yet."""

    def set(self, level: float, now: float) -> None:
        """The quantity is ``level`` from now on. Raises ValueError when time goes backwards."""
        self.total = self.until(now)
        self.level, self.since = level, now

    def until(self, now: float) -> float:
        """The integral so far. Raises ValueError for a time before the latest change."""
        if self.since is None:
            return self.total
        if now < self.since:
            raise ValueError(f"time goes backwards: {now} s after {self.since} s")
        return self.total + self.level * (now - self.since)


@dataclass(frozen=True)
class Cost:
    """Byte-seconds."""

    proxy: float
    resident: float
    provisioned: float


class CostMeter:
    """Adds up what happens. Live: one per instance, summed by whoever shows them."""

    def __init__(self, misc_bytes: float = 0.0) -> None:
        """``misc_bytes``: the paper's M_misc, memory of everything but experts, charged for T_misc."""
        self._misc_bytes = misc_bytes
        self._layers = self._misc = 0.0
        self._held, self._provided = Integral(), Integral()

    def layer(self, seconds: float, held_bytes: float, misc_s: float = 0.0) -> None:
        """A layer has run for so long, while its own replicas held so many bytes; ``misc_s``: its T_misc."""
        self.layers(seconds * held_bytes, misc_s)

    def layers(self, byte_seconds: float, misc_s: float) -> None:
        """Several layers at once: the sum of each one's time times its bytes, and of their T_misc."""
        self._layers += byte_seconds
        self._misc += misc_s

    def hold(self, resident_bytes: float, now: float) -> None:
        """From now on experts take so much memory."""
        self._held.set(resident_bytes, now)

    def provide(self, instance_bytes: float, now: float) -> None:
        """From now on all instances together have so much memory."""
        self._provided.set(instance_bytes, now)

    def read(self, now: float) -> Cost:
        """So far."""
        misc = self._misc * self._misc_bytes
        return Cost(self._layers + misc, self._held.until(now) + misc, self._provided.until(now))
