"""The seam to whatever starts and stops instances."""

from typing import Protocol

from shared.errors import MoemeshError
from shared.messages import Pool


class ActuatorFailed(MoemeshError):
    """The size of a pool was not changed; carries what was wrong, where, and what to do."""


class Actuator(Protocol):
    """Changes the sizes of pools. One call at a time."""

    async def scale(self, pool: Pool, count: int) -> None:
        """Have so many instances of a pool: more are started, not waited for; those that are too many drain.

        ``count`` is absolute: asking again for what is there changes nothing. Raises ActuatorFailed; the pool is then
        as it was.
        """
        ...

    async def close(self) -> None:
        """Let go of connections."""
        ...
