"""Where experts live: round-robin homes over the READY expert instances. Pure functions, no I/O.

Covers who takes part, how many homes an expert has, and when a new version is due. Load does not matter here.
"""

from collections.abc import Sequence

import numpy as np

from shared.membership import Member
from shared.messages import MAX_EXPERT_INSTANCES, ModelFacts, Placement
from shared.scheduling.policies import Policy


def round_robin(instances: Sequence[str], moe_layers: int, experts: int, homes_per_expert: int) -> np.ndarray:
    """Homes of every expert: uint64 [moe_layers, experts], bit i = ``instances[i]``.

    Expert e of the l-th MoE layer gets ``homes_per_expert`` consecutive instances (all, when there are fewer),
    beginning with number e + l: the layers begin at different instances, so that remainders spread. Raises ValueError
    when an expert would be left without a home, or when there are more instances than bits.
    """
    count = len(instances)
    if not 1 <= count <= MAX_EXPERT_INSTANCES:
        raise ValueError(f"{count} expert instances: a placement takes 1 to {MAX_EXPERT_INSTANCES}")
    if homes_per_expert < 1:
        raise ValueError(f"{homes_per_expert} homes per expert would leave experts without one")
    first = np.arange(moe_layers)[:, None] + np.arange(experts)[None, :]
    offsets = np.arange(min(homes_per_expert, count))
    bits = np.uint64(1) << ((first[..., None] + offsets) % count).astype(np.uint64)
    return np.bitwise_or.reduce(bits, axis=-1)


def homes_per_expert(setting: int, devices: Sequence[str]) -> int:
    """The ``--homes`` setting; 0 = every instance when all are on CPU (they share the weights), else one."""
    if setting > 0:
        return setting
    return len(devices) if all(device == "cpu" for device in devices) else 1


def mesh_model(current: Placement | None, ready: Sequence[Member]) -> ModelFacts | None:
    """The model to place: the current placement's while anybody READY serves it, else that of the lowest id."""
    models = [m.heartbeat.model for m in ready if m.heartbeat.model]
    same = [model for model in models if current and model.digest == current.digest]
    return next(iter(same or models), None)


def participants(current: Placement | None, ready: Sequence[Member], digest: str) -> list[str]:
    """Ids of the expert instances that take part, sorted; those that already do go before newcomers at the limit."""
    ids = [m.id for m in ready if m.heartbeat.model and m.heartbeat.model.digest == digest]
    placed = set(current.instances) if current else set()
    return sorted(sorted(ids, key=lambda i: (i not in placed, i))[:MAX_EXPERT_INSTANCES])


def next_placement(
    current: Placement | None,
    ready: Sequence[Member],
    homes: int,
    author: str,
    epoch: int,
    newest: int = 0,
    policy: Policy = Policy.ACTIVATED,
) -> Placement | None:
    """The version that should follow ``current``, or None when nothing has to change.

    ``ready``: READY expert instances, sorted by id; with none of them the last placement stays. ``homes``: the setting.
    ``newest``: highest version that any instance reports, which the next one must exceed even if the store was lost.
    """
    model = mesh_model(current, ready)
    if model is None:
        return None
    instances = participants(current, ready, model.digest)
    if current and (current.digest, list(current.instances), current.policy) == (model.digest, instances, policy):
        return None
    devices = [m.heartbeat.device for m in ready if m.id in instances]
    table = round_robin(instances, len(model.moe_layers), model.experts, homes_per_expert(homes, devices))
    return Placement(
        version=max(current.version if current else 0, newest) + 1,
        epoch=epoch,
        author=author,
        reason=reason(current, instances, policy),
        digest=model.digest,
        instances=tuple(instances),
        moe_layers=model.moe_layers,
        experts=model.experts,
        homes=table.astype("<u8").tobytes(),
        policy=policy,
    )


def reason(current: Placement | None, instances: Sequence[str], policy: Policy) -> str:
    """One line for a person: who joined and who left, or what else is new."""
    before = set(current.instances) if current else set()
    joined = [i for i in instances if i not in before]
    left = sorted(before - set(instances))
    parts = [f"{', '.join(ids)} {verb}" for ids, verb in ((joined, "joined"), (left, "left")) if ids]
    if current and current.policy is not policy:
        parts.append(f"homes are chosen by policy {policy}")
    return "; ".join(parts) or "another model"
