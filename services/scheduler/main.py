"""The scheduler process: membership in, placement out."""

import os
import sys

from services.scheduler.reconciler import Reconciler
from shared.config import SchedulerConfig, load_config
from shared.lifecycle import Instance, run
from shared.messages import Kind


async def serve(config: SchedulerConfig) -> None:
    """Run one scheduler until it is told to stop. Raises ConfigError, BusUnavailable."""
    async with Instance(Kind.SCHEDULER, config) as instance:
        reconciler = await Reconciler.start(instance, config)
        await instance.ready(reconciler.facts)
        await instance.until_stopped()
        await reconciler.stop()


def main(config: SchedulerConfig) -> int:
    """Returns the exit status."""
    return run(serve(config), config)


if __name__ == "__main__":
    sys.exit(main(load_config(SchedulerConfig, os.environ)))
