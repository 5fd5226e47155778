"""Instances for control-plane tests: real heartbeats and facts, no model behind them."""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

from shared.changes import PlacementRecord
from shared.config import MeshConfig
from shared.lifecycle import Instance
from shared.messages import AttentionFacts, ExpertFacts, Kind, ModelFacts
from shared.placement_watch import PlacementWatch

MODEL = ModelFacts(name="m", digest="aa", layers=2, moe_layers=(0, 1), experts=4, top_k=2)
LIMITS = AttentionFacts(max_model_len=1, kv_blocks=1, block_size=1, max_num_seqs=1)
OTHER_MODEL = MODEL.model_copy(update={"name": "n", "digest": "bb"})


@asynccontextmanager
async def expert(
    config: MeshConfig,
    model: ModelFacts = MODEL,
    loads: Callable[[int], bool] = lambda version: True,
    slots: int = 0,
    joined: asyncio.Barrier | None = None,
) -> AsyncIterator[Instance]:
    """A READY expert instance that says at once to have loaded what is stored, as far as it ``loads`` a version.

    ``joined``: instances that become READY together.
    """
    async with Instance(Kind.EXPERTS, config, signals=False) as instance:
        await instance.join(model)
        watch = await PlacementWatch(instance).start()

        def facts() -> dict[str, ExpertFacts]:
            versions = [p.version for p in watch.record.versions] if watch.record else []
            loaded = max(filter(loads, versions), default=0)
            return {"experts": ExpertFacts(address=b"x", placement=loaded, slots=slots)}

        announce_changes(instance, watch)
        if joined:
            await joined.wait()
        await instance.ready(facts)
        yield instance


@asynccontextmanager
async def attention(
    config: MeshConfig, model: ModelFacts = MODEL, uses: Callable[[int], bool] = lambda version: True
) -> AsyncIterator[Instance]:
    """A READY attention instance that says to use the newest committed version that it ``uses``."""
    async with Instance(Kind.ATTENTION, config, signals=False) as instance:
        await instance.join(model)
        watch = await PlacementWatch(instance).start()
        used = 0

        def facts() -> dict[str, AttentionFacts]:
            nonlocal used
            committed = watch.current.version if watch.current else 0
            used = committed if uses(committed) else used
            return {"attention": LIMITS.model_copy(update={"placement": used})}

        announce_changes(instance, watch)
        await instance.ready(facts)
        yield instance


def announce_changes(instance: Instance, watch: PlacementWatch) -> None:
    """A heartbeat whenever another record is stored."""

    def announce() -> None:
        instance.spawn(instance.announce(), "announce")

    watch.on_change(announce)


def committed(record: PlacementRecord | None) -> int:
    """Version of the committed placement, 0 when there is none."""
    return record.committed.version if record and record.committed else 0
