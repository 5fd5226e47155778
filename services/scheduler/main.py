"""The scheduler process: membership in, placement and sizes of pools out."""

import asyncio
import os
import sys
from typing import Any

from shared.config import SchedulerConfig, load_config
from shared.errors import ConfigError
from shared.kernels.threads import thread_environment
from shared.lifecycle import Instance, run
from shared.messages import Kind

MIN_LEASE_S = 0.5
"""A renewal must fit in a quarter of it, with a busy machine on both sides."""


def check(config: SchedulerConfig) -> None:
    """Raises ConfigError for settings out of range."""
    if config.homes < 0:
        raise ConfigError("--homes", f"{config.homes} is below 0")
    if config.prepare_deadline <= 0:
        raise ConfigError("--prepare-deadline", f"{config.prepare_deadline:g} is not above 0 seconds")
    if config.rebalance_s < 0:
        raise ConfigError("--rebalance-s", f"{config.rebalance_s:g} is below 0 seconds")
    if config.expert_scaling_s < 0:
        raise ConfigError("--expert-scaling-s", f"{config.expert_scaling_s:g} is below 0 seconds")
    if config.target_layer_ms < 0:
        raise ConfigError("--target-layer-ms", f"{config.target_layer_ms:g} is below 0 milliseconds")
    if config.target_prefill_layer_ms < 0:
        problem = f"{config.target_prefill_layer_ms:g} is below 0 milliseconds"
        raise ConfigError("--target-prefill-layer-ms", problem)
    if config.lease_s < MIN_LEASE_S:
        raise ConfigError("--lease-s", f"{config.lease_s:g} is below {MIN_LEASE_S:g} seconds")


async def serve(config: SchedulerConfig) -> None:
    """Run one scheduler until it is told to stop. Raises ConfigError, BusUnavailable."""
    # Imported here: numba reads the environment that main has set.
    from services.scheduler.actuators.build import build_actuator
    from services.scheduler.autoscale_settings import autoscaling_by
    from services.scheduler.autoscaler import Autoscaler
    from services.scheduler.pool_loop import PoolLoop
    from services.scheduler.reconciler import Reconciler
    from shared.activation import compile_choice
    from shared.elastic.placing import compile_placing

    check(config)
    going_by = autoscaling_by(config)
    async with Instance(Kind.SCHEDULER, config) as instance:
        actuator = build_actuator(instance, config)
        reconciler = await Reconciler.start(instance, config)
        pools = PoolLoop(instance, reconciler.leader, actuator, config.actuator)
        await pools.start()
        autoscaler = Autoscaler(instance, *going_by, config.autoscale == "on", pools, reconciler) if going_by else None
        if autoscaler:
            await autoscaler.start()

        def facts() -> dict[str, Any]:
            placed = reconciler.facts()
            more = autoscaler.facts() if autoscaler else {}
            detail = "; ".join(filter(None, (placed["detail"], pools.problem)))
            return {**placed, **pools.facts(), **more, "detail": detail}

        for compiled in (compile_choice, compile_placing):  # seconds, the first time on a host: not when needed
            await asyncio.to_thread(compiled)
        await instance.ready(facts)
        await instance.until_stopped()
        if autoscaler:
            await autoscaler.stop()
        await pools.stop()
        await reconciler.stop()


def main(config: SchedulerConfig) -> int:
    """Returns the exit status."""
    os.environ.update(thread_environment(1, os.environ))
    return run(serve(config), config)


if __name__ == "__main__":
    sys.exit(main(load_config(SchedulerConfig, os.environ)))
