"""``--actuator external``: somebody else reads what is desired (KEDA, an HPA, a script) and sees to it."""

from shared.messages import Pool


class ExternalActuator:
    """Changes nothing itself: the scheduler shows what is desired as ``/desired`` and ``moemesh_desired_instances``."""

    async def scale(self, pool: Pool, count: int) -> None:
        """What is desired is known already."""

    async def close(self) -> None:
        """There is nothing to close."""
