"""The life of a change of the placement: PREPARE -> COMMIT -> RELEASE. Pure transitions of the stored record.

PREPARE: expert instances load the new homes and say so; who does not in time aborts the change, and the old version
stays. COMMIT: attention switches between two steps and says so. RELEASE is the transition back to SETTLED, after which
expert instances let go of the old homes. Every record in between can be carried on by any scheduler.
"""

from collections.abc import Iterable, Sequence

import numpy as np

from shared.changes import Phase, PlacementRecord
from shared.membership import Member
from shared.messages import Placement, State
from shared.placement_watch import behind, homes_array, unloaded

NOTHING = PlacementRecord(epoch=0, serial=0, newest=0)
"""What is stored before anything is."""


def begin(record: PlacementRecord, placement: Placement) -> PlacementRecord:
    """Prepare ``placement``, whose version must be new; nothing else may be under way."""
    if record.phase is not Phase.SETTLED or placement.version <= record.newest:
        raise ValueError(f"version {placement.version} cannot follow {record.newest} in phase {record.phase}")
    newest = {"newest": placement.version, "epoch": placement.epoch}
    return _next(record, phase=Phase.PREPARE, other=placement, **newest)


def advance(record: PlacementRecord, members: Sequence[Member], overdue: bool) -> PlacementRecord | None:
    """The record that should follow while a change is under way; None: wait.

    Args:
        members: everybody who is in the mesh.
        overdue: the phase has taken as long as it may.
    """
    if record.phase is Phase.PREPARE and record.other:
        why = obstacle(record.other, record.committed, members, overdue)
        if why:
            return abort(record, why)
        return None if unloaded(record.other, members) else _commit(record, record.other)
    if record.phase is Phase.COMMIT and record.committed:
        late = behind(record.committed, members) if record.other else []
        return _release(record, record.committed, late) if overdue or not late else None
    return None


def abort(record: PlacementRecord, why: str) -> PlacementRecord:
    """Stay with what is committed."""
    assert record.other is not None  # only what is being prepared can be aborted
    verdict = f"placement {record.other.version} ({record.other.reason}) was aborted: {why}"
    return _next(record, phase=Phase.SETTLED, other=None, verdict=verdict)


def obstacle(placement: Placement, committed: Placement | None, members: Sequence[Member], overdue: bool) -> str:
    """Why ``placement`` cannot be prepared; "" when nothing speaks against it.

    Being late does not, when the committed placement does not serve either: there is nothing to go back to.
    """
    ready = {m.id: m for m in members if m.ready}
    left = [i for i in placement.instances if i not in ready]
    if left:
        return f"{', '.join(left)} left"
    for member in (ready[i] for i in placement.instances):
        if member.heartbeat.experts and member.heartbeat.experts.refused == placement.version:
            return f"{member.id} refuses it: {member.heartbeat.detail}"
    late = unloaded(placement, members)
    if overdue and late and committed and serves(committed, members):
        return f"{', '.join(late)} did not load it in time"
    return ""


def serves(placement: Placement, members: Iterable[Member]) -> bool:
    """Whether every expert has a home on an instance that answers."""
    answering = {m.id for m in members if m.heartbeat.state in (State.READY, State.DRAINING)}
    live = sum(1 << bit for bit, id in enumerate(placement.instances) if id in answering)
    return bool((homes_array(placement) & np.uint64(live)).all())


def _commit(record: PlacementRecord, placement: Placement) -> PlacementRecord:
    return _next(record, phase=Phase.COMMIT, committed=placement, other=record.committed)


def _release(record: PlacementRecord, placement: Placement, late: Sequence[str]) -> PlacementRecord:
    verdict = f"placement {placement.version} ({placement.reason}) is in use"
    verdict += f"; {', '.join(late)} did not switch in time and has to repeat exchanges" if late else ""
    return _next(record, phase=Phase.SETTLED, other=None, verdict=verdict)


def _next(record: PlacementRecord, **changes: object) -> PlacementRecord:
    return record.model_copy(update={"serial": record.serial + 1, **changes})
