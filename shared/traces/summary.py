"""What is in a routing trace, in a few numbers for a person."""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from shared.traces.load import KINDS, kind_of, open_trace
from shared.traces.native import read_header
from shared.traces.records import Exchange, RowCounts, count_rows, dominant_of


@dataclass
class LayerSummary:
    """One layer of a trace."""

    rows: RowCounts = field(default_factory=Counter)
    activated: list[int] = field(default_factory=list)
    """Distinct experts of each exchange."""

    def add(self, exchange: Exchange) -> None:
        count_rows(exchange, self.rows)
        self.activated.append(len(np.unique(exchange.ids)))

    @property
    def top_share(self) -> float:
        """Share of the most frequent set of experts among the rows."""
        return self.rows.most_common(1)[0][1] / self.rows.total() if self.rows else 0.0


@dataclass
class Summary:
    """A whole trace."""

    kind: str
    model: str = ""
    """Its name, "" when the file does not say."""
    experts: int = 0
    """Per layer; 1 + the highest id when the file does not say."""
    layers: dict[int, LayerSummary] = field(default_factory=dict)
    steps: set[int] = field(default_factory=set)
    top_k: int = 0

    @property
    def exchanges(self) -> int:
        return sum(len(layer.activated) for layer in self.layers.values())

    @property
    def warning(self) -> str:
        """Why this is no real routing; empty: it may be."""
        return dominant_of({number: layer.rows for number, layer in self.layers.items()})


def summarize(path: Path) -> Summary:
    """Read a whole trace. Raises BadTrace, OSError."""
    kind = kind_of(path)
    summary = Summary(KINDS[kind])
    if kind == "native":
        header = read_header(path)
        summary.model, summary.experts = header.model, header.experts
        summary.layers = {layer: LayerSummary() for layer in header.layers}
    _add(summary, open_trace(path))
    return summary


def _add(summary: Summary, exchanges: Iterable[Exchange]) -> None:
    for exchange in exchanges:
        summary.layers.setdefault(exchange.layer, LayerSummary()).add(exchange)
        summary.steps.add(exchange.step)
        summary.top_k = max(summary.top_k, exchange.ids.shape[1])
        summary.experts = max(summary.experts, 1 + int(exchange.ids.max(initial=-1)))
