"""A replay from files: what is read, checked and formed once, and then run by one policy after the other."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from shared.errors import ConfigError
from shared.replay.arrivals import read_arrivals
from shared.replay.base import Settings
from shared.replay.inputs import Inputs
from shared.replay.policies import check_policies
from shared.replay.routing import Passages, read_passages
from shared.replay.run import Outcome, closed, run_policy, static_clock
from shared.replay.work import Work, form_work

MOST_CONTEXT = 2048
"""Contexts are cut there: what the recorded model can take."""
YARDSTICKS = ("static", "oracle")
"""What every other policy is compared with."""
Progress = Callable[[str, float], None]
"""Is told what is under way, and what share of it is done."""


@dataclass(frozen=True)
class Files:
    """What a replay is made of; one routing trace for each domain, and a predicted one for each of them or none."""

    routing: tuple[Path, ...]
    predicted: tuple[Path, ...]
    arrivals: Path


@dataclass(frozen=True)
class Draw:
    """Which requests there are, and how they become batches."""

    seconds: float = 0.0
    """Of the arrival trace; 0: all."""
    a_second: bool = False
    """All requests of one second are one batch, as in the paper; else batches are formed as the engine forms them."""
    seed: int = 0


def read_domains(files: Files, distance: int) -> list[tuple[Passages, Passages | None]]:
    """Routing and predicted routing of each domain. Raises BadTrace, Mismatch, ConfigError, OSError."""
    if files.predicted and len(files.predicted) != len(files.routing):
        problem = (
            f"{len(files.predicted)} predicted traces for {len(files.routing)} of routing: give one for each, in order"
        )
        raise ConfigError("--predicted", problem)
    domains = []
    for number, path in enumerate(files.routing):
        routing = read_passages(path)
        predicted = read_passages(files.predicted[number], routing) if files.predicted else None
        if predicted is not None:
            _check_distance(files.predicted[number], predicted, distance)
        domains.append((routing, predicted))
    return domains


def _check_distance(path: Path, predicted: Passages, distance: int) -> None:
    """The first layer of which there is a prediction tells from how far it was made."""
    first = int(predicted.known.argmax())
    if first != distance:
        raise ConfigError("--distance", f"{distance}, but {path} predicts from a distance of {first}")


def form(files: Files, inputs: Inputs, settings: Settings, draw: Draw, progress: Progress) -> Work:
    """Read the files and form all steps."""
    domains = read_domains(files, settings.distance)
    arrivals = read_arrivals(files.arrivals, MOST_CONTEXT).first(draw.seconds)
    routing = domains[0][0]
    clock = static_clock(inputs, len(routing.layers), routing.experts, settings.form)
    return form_work(
        domains, arrivals, inputs, clock, draw.a_second, draw.seed, lambda share: progress("batches", share)
    )


def compare(
    work: Work, inputs: Inputs, settings: Settings, policies: Sequence[str], progress: Progress
) -> dict[str, Outcome]:
    """The yardsticks and some policies. Raises ConfigError for an unknown one before anything runs, BudgetTooSmall."""
    check_policies(policies)
    names = [*YARDSTICKS, *(name for name in dict.fromkeys(policies) if name not in YARDSTICKS)]
    return {
        name: run_policy(name, work, inputs, settings, lambda share, name=name: progress(name, share)) for name in names
    }


def against(outcome: Outcome, outcomes: dict[str, Outcome]) -> dict[str, float]:
    """How a policy does beside the yardsticks, and EPLB if it was run: ratios."""
    static, oracle = (outcomes[name] for name in YARDSTICKS)
    eplb = outcomes.get("eplb")
    ratios = {
        "closed": closed(outcome, static, oracle),
        "layer_vs_static": outcome.times.mean() / static.times.mean(),
        "resident_vs_static": outcome.resident / static.resident,
        "proxy_vs_static": outcome.proxy / static.proxy,
    }
    if eplb:
        ratios["layer_vs_eplb"] = outcome.times.mean() / eplb.times.mean()
    return {name: round(float(value), 4) for name, value in ratios.items()}
