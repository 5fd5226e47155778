"""The experts process: settings in, a server in the compute thread, NATS in this one."""

import os
import sys
from functools import partial

from shared.compute import ComputeSide, compute_side, run_compute
from shared.config import ExpertsConfig, load_config
from shared.errors import ConfigError
from shared.messages import Kind


def check(config: ExpertsConfig) -> None:
    """Raises ConfigError for settings out of range."""
    if config.slots < 0:
        raise ConfigError("--slots", f"{config.slots} is below 0")
    if config.max_batched_tokens < 1:
        raise ConfigError("--max-batched-tokens", f"{config.max_batched_tokens} is less than 1")


async def serve(config: ExpertsConfig, threads: int) -> None:
    """Run one expert instance until it is told to stop.

    Raises ConfigError, ModelError, TransportError, BusUnavailable, and whatever ends the compute thread.
    """
    check(config)
    async with compute_side(Kind.EXPERTS, config, threads) as side:
        await _serve_on(side, config)


async def _serve_on(side: ComputeSide, config: ExpertsConfig) -> None:
    # Imported here: torch and numba read the environment that main has set.
    from services.experts.build import build
    from services.experts.service import ExpertsService
    from shared.placement_watch import PlacementWatch

    instance = side.instance

    def record(trace: tuple[bytes, bytes], start_ns: int, end_ns: int, layer: int, parts: int) -> None:
        instance.telemetry.record("experts.exchange", trace, start_ns, end_ns, layer=layer, parts=parts)

    built = await side.call(partial(build, config, side, record))
    service = ExpertsService(instance, built, side.checkpoint.spec.moe_layers)
    computing = instance.spawn(side.call(built.run), "compute")
    instance.telemetry.collect(service.samples)
    await service.start(await PlacementWatch(instance).start())
    fixed = {"device": str(side.device), "paced": built.pace.name}
    await instance.ready(lambda: {"experts": service.facts(), "costs": service.costs(), **fixed})
    await instance.until_stopped()
    await service.drain(config.drain_s)
    built.server.stop()
    await computing


def main(config: ExpertsConfig) -> int:
    """Returns the exit status."""
    return run_compute(serve, config, os.environ)


if __name__ == "__main__":
    sys.exit(main(load_config(ExpertsConfig, os.environ)))
