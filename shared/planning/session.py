"""A question of ``moemesh plan``, from files and names to what a search has found."""

from dataclasses import dataclass
from pathlib import Path

from shared.errors import MoemeshError
from shared.planning.amax import load, save
from shared.planning.assemble import MOST, Names, Show, assemble
from shared.planning.hardware import FILE, load_hardware
from shared.planning.report import infeasible
from shared.planning.routing import Routing, recorded, synthetic
from shared.planning.search import Found, Space, highest_rate, look_at_all, search, space_of
from shared.planning.setting import Demand, Setting, Slo
from shared.planning.sizes import Sizes, read_sizes


@dataclass(frozen=True)
class Question:
    """What is to be planned."""

    model: Path
    names: Names
    demand: Demand
    slo: Slo
    trace: Path | None = None
    zipf: float | None = 0.6
    """Without a trace: exponent of the experts' popularity; None: the bound."""
    tables: Path | None = None
    """Read if it is there, else written."""
    hardware: Path = FILE
    most: int = MOST
    """Instances of a pool."""


@dataclass(frozen=True)
class Answer:
    """What was found, and in what."""

    setting: Setting
    space: Space
    found: Found
    exact: float
    """Distance of the best plan's price per token and second from the least of all candidates, as a share."""


class Infeasible(MoemeshError):
    """No plan keeps the limits; says which one binds, and what would do."""


def answer(question: Question, show: Show, top: int = 5) -> Answer:
    """Plan. Raises ConfigError, ModelError, BadTrace for wrong input, and OSError; not when nothing is feasible."""
    sizes = read_sizes(question.model)
    known = load(question.tables) if question.tables and question.tables.exists() else None
    setting = assemble(
        load_hardware(question.hardware), sizes, question.names, routing_of(question, sizes),
        most=question.most, tables=known, show=show,
    )  # fmt: skip
    if question.tables and known is None:
        save(setting.tables, question.tables)
    space = space_of(setting, question.most)
    found = search(setting, space, question.demand, question.slo, top=top)
    best = found.best
    exact = look_at_all(setting, space, question.demand, question.slo) if best else 0.0
    return Answer(setting, space, found, best.price / best.tokens_per_s / exact - 1 if best else 0.0)


def routing_of(question: Question, sizes: Sizes) -> Routing | None:
    """Recorded, synthetic, or none."""
    if question.trace:
        return recorded(question.trace, sizes.experts, sizes.top_k)
    return None if question.zipf is None else synthetic(sizes.experts, sizes.top_k, question.zipf)


def refusal(question: Question, given: Answer) -> Infeasible:
    """Why there is no plan."""
    rate = highest_rate(given.setting, given.space, question.demand, question.slo)
    return Infeasible(infeasible(given.found, question.slo, rate))
