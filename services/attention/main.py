"""The attention process: settings in, an engine in the compute thread, NATS in this one."""

import os
import sys
import time
from collections.abc import Iterable
from functools import partial

from shared.compute import ComputeSide, compute_side, run_compute
from shared.config import AttentionConfig, load_config
from shared.errors import ConfigError
from shared.messages import Kind
from shared.metrics import Sample


async def serve(config: AttentionConfig, threads: int) -> None:
    """Run one attention instance until it is told to stop.

    Raises ConfigError, ModelError, TransportError, BusUnavailable, and whatever ends the compute thread.
    """
    if config.monolith and config.pace:
        raise ConfigError("--pace", "a monolith has no pools to pace; leave out --monolith")
    async with compute_side(Kind.ATTENTION, config, threads) as side:
        await _serve_on(side, config)


async def _serve_on(side: ComputeSide, config: AttentionConfig) -> None:
    # Imported here: torch and numba read the environment that main has set.
    from services.attention.build import build
    from services.attention.reports import RoutingReports
    from services.attention.server import AttentionServer
    from services.attention.stats import facts, samples
    from shared.placement_watch import PlacementWatch

    instance = side.instance
    server = AttentionServer(instance, side.checkpoint.digest)
    built = await side.call(partial(build, config, side, server.emit))
    engine, limits = built.engine, built.limits

    def read_metrics() -> Iterable[Sample]:
        yield from samples(engine.stats, limits, engine.step_seconds, engine.desk.refused)
        yield from built.exchange.samples()
        yield from built.pace.samples()
        yield from built.tap.samples() if built.tap else ()

    instance.telemetry.collect(read_metrics)
    computing = instance.spawn(side.call(built.run), "compute")
    watch = await PlacementWatch(instance).start()
    await server.start(engine, watch, limits.max_model_len, built.exchange.foresee)
    if built.tap:
        await RoutingReports(instance, built.tap).start()
    fixed = {"device": str(side.device), "paced": built.pace.name}
    read_facts = partial(facts, limits=limits, exchange=built.exchange, monolith=config.monolith)
    await instance.ready(lambda: {"attention": read_facts(engine.stats, now=time.monotonic()), **fixed})
    await instance.until_stopped()
    await server.drain(config.drain_s)
    engine.stop()
    await computing


def main(config: AttentionConfig) -> int:
    """Returns the exit status."""
    return run_compute(serve, config, os.environ)


if __name__ == "__main__":
    sys.exit(main(load_config(AttentionConfig, os.environ)))
