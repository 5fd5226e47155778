"""One mesh, one model: which instances are refused because they serve another one.

The first to be READY decide; when two models came up in the same moment, the placement decides, and the other leaves.
A stored placement that nobody READY serves binds nobody, so that a stopped mesh can come back with another model.
"""

import asyncio
import logging
from collections.abc import Sequence

from shared.bus import Bus
from shared.errors import BusUnavailable, ModelError
from shared.membership import Member, Members
from shared.messages import ModelFacts
from shared.placement_watch import read_record

log = logging.getLogger(__name__)


def ruled_out_by(model: ModelFacts, joined: bool, ready: Sequence[Member], placed: str | None) -> Member | None:
    """The READY member whose model excludes ``model``, or None when it may be served.

    ``joined``: we are READY already, so that only the placement can rule us out. ``placed``: digest of the placement.
    """
    digests = {m.id: m.heartbeat.model.digest for m in ready if m.heartbeat.model}
    others = [m for m in ready if digests.get(m.id, model.digest) != model.digest]
    ruling = [m for m in others if digests[m.id] == placed]
    ours_is_placed = placed == model.digest and model.digest in digests.values()
    candidates = ruling if joined or ours_is_placed else ruling or others
    return next(iter(candidates), None)


async def check_model(model: ModelFacts, joined: bool, members: Members, bus: Bus) -> None:
    """Raises ModelError when the mesh serves another model, BusUnavailable when that cannot be known."""
    ready = [m for m in members.all() if m.ready and m.heartbeat.model]
    if not ruled_out_by(model, False, ready, None):
        return  # the usual case: nobody serves anything else
    stored, _ = await read_record(await bus.store(members.subjects.bucket))
    placed = stored.versions[0].digest if stored and stored.versions else None
    other = ruled_out_by(model, joined, ready, placed)
    if other and other.heartbeat.model:
        theirs = other.heartbeat.model
        raise ModelError(
            model.name,
            f"this mesh serves another model: {other.id} has {theirs.name} (digest {theirs.digest}), "
            f"here it is {model.digest}; give the same --model or another --mesh",
        )


async def stay_with(model: ModelFacts, members: Members, bus: Bus) -> None:
    """For an instance that is READY: check again whenever the mesh changes. Runs until it raises ModelError."""
    changed = asyncio.Event()
    changed.set()
    members.on_change(changed.set)
    while True:
        await changed.wait()
        changed.clear()
        try:
            await check_model(model, True, members, bus)
        except BusUnavailable as error:
            log.debug("model not compared: %s", error)  # the next change comes
