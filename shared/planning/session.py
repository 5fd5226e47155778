"""A question of ``moemesh plan``, from files and names to what a search has found."""

from dataclasses import dataclass
from functools import partial
from pathlib import Path

from shared.errors import MoemeshError
from shared.models.source import open_source
from shared.planning.amax import Amax, load, save
from shared.planning.assemble import MOST, Names, Show, assemble, check, experts_table
from shared.planning.fitted_file import load_fitted
from shared.planning.hardware import FILE, load_hardware
from shared.planning.here import setting_here, space_here
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
    """Of hardware; its prices count with a profile too."""
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
    profile: Path | None = None
    """Fitted coefficients, instead of hardware."""


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
    """Plan. Raises ConfigError, ModelError, BadTrace, BadProfile for wrong input, and OSError; not when nothing is
    feasible."""
    known = load(question.tables) if question.tables and question.tables.exists() else None
    setting, space = (fitted if question.profile else computed)(question, known, show)
    if question.tables and known is None:
        save(setting.tables, question.tables)
    found = search(setting, space, question.demand, question.slo, top=top)
    best = found.best
    exact = look_at_all(setting, space, question.demand, question.slo) if best else 0.0
    return Answer(setting, space, found, best.price / best.tokens_per_s / exact - 1 if best else 0.0)


def computed(question: Question, tables: Amax | None, show: Show) -> tuple[Setting, Space]:
    """For hardware by its name."""
    sizes = read_sizes(question.model)
    setting = assemble(
        load_hardware(question.hardware), sizes, question.names, routing_of(question, sizes),
        most=question.most, tables=tables, show=show,
    )  # fmt: skip
    return setting, space_of(setting, question.most)


def fitted(question: Question, tables: Amax | None, show: Show) -> tuple[Setting, Space]:
    """For the machine that a profile was made on. Raises ConfigError when nothing of that size was measured."""
    assert question.profile, "there is a profile"
    found, points = load_fitted(question.profile, open_source(str(question.model)).digest)
    sizes = found.sizes
    if tables is None:
        trace = question.trace or question.profile.with_suffix(".trace")
        routing = recorded(trace, sizes.experts, sizes.top_k, max(point.batch for point in points))
        say = partial(show, "tables of a_max")
        tables = experts_table(routing, sizes, sizes.experts, found.most_experts, say)
    check(tables, sizes, sizes.experts)
    setting = setting_here(found, tables, question.names.attention_price, question.names.expert_price)
    most = 1, question.most
    return setting, space_here(found, setting, most, most)


def routing_of(question: Question, sizes: Sizes) -> Routing | None:
    """Recorded, synthetic, or none."""
    if question.trace:
        return recorded(question.trace, sizes.experts, sizes.top_k)
    return None if question.zipf is None else synthetic(sizes.experts, sizes.top_k, question.zipf)


def refusal(question: Question, given: Answer) -> Infeasible:
    """Why there is no plan."""
    rate = highest_rate(given.setting, given.space, question.demand, question.slo)
    return Infeasible(infeasible(given.found, question.slo, rate))
