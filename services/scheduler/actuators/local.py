"""``--actuator local``: the `moemesh up` that has started this scheduler starts and stops processes."""

from services.scheduler.actuators.base import ActuatorFailed
from shared.bus import Bus
from shared.errors import BusUnavailable, Refused
from shared.messages import Pool, Subjects
from shared.pool_messages import Resize, Resized

ANSWER_LIMIT_S = 90.0
"""Longer than two changes take whose instances drain until they are killed."""


class LocalActuator:
    """Asks over NATS."""

    def __init__(self, bus: Bus, subjects: Subjects) -> None:
        self._bus = bus
        self._subject = subjects.resize

    async def scale(self, pool: Pool, count: int) -> None:
        """See ``Actuator``."""
        try:
            await self._bus.request(self._subject, Resize(pool=pool, count=count), Resized, ANSWER_LIMIT_S)
        except BusUnavailable as error:
            raise ActuatorFailed(
                f"local: no `moemesh up` sees to this mesh ({error.problem}); choose another --actuator"
            ) from error
        except Refused as refusal:
            raise ActuatorFailed(f"local: {refusal.message}") from refusal

    async def close(self) -> None:
        """The connection is the instance's."""
