"""The policies of a replay by name."""

from collections.abc import Callable, Mapping, Sequence

from shared.errors import ConfigError
from shared.replay.base import Policy, Settings
from shared.replay.baselines import Eplb, Oracle, Static
from shared.replay.inputs import Inputs
from shared.replay.moemesh import Moemesh
from shared.replay.papers import Paper
from shared.replay.work import Work

POLICIES: Mapping[str, Callable[[Work, Inputs, Settings], Policy]] = {
    "static": Static, "eplb": Eplb, "oracle": Oracle, "paper": Paper, "moemesh": Moemesh,
}  # fmt: skip


def make_policy(name: str, work: Work, inputs: Inputs, settings: Settings) -> Policy:
    """Raises ConfigError for an unknown policy, BudgetTooSmall."""
    check_policies([name])
    return POLICIES[name](work, inputs, settings)


def check_policies(names: Sequence[str]) -> None:
    """Raises ConfigError for one that is unknown."""
    for name in names:
        if name not in POLICIES:
            raise ConfigError("--policy", f"{name!r} is none of {', '.join(POLICIES)}")
