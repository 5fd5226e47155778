"""Instances for control-plane tests: real heartbeats and facts, no model behind them."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from shared.config import MeshConfig
from shared.lifecycle import Instance
from shared.messages import ExpertFacts, Kind, ModelFacts

MODEL = ModelFacts(name="m", digest="aa", layers=2, moe_layers=(0, 1), experts=4, top_k=2)
OTHER_MODEL = MODEL.model_copy(update={"name": "n", "digest": "bb"})


@asynccontextmanager
async def expert(config: MeshConfig, model: ModelFacts = MODEL) -> AsyncIterator[Instance]:
    """A READY expert instance that has loaded nothing yet."""
    async with Instance(Kind.EXPERTS, config, signals=False) as instance:
        await instance.join(model)
        await instance.ready(lambda: {"experts": ExpertFacts(address=b"x")})
        yield instance
