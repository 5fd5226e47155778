"""Exchanges of groups in one phase: every member sends its share of the rows, and the last one makes them whole.

All instances must see the same rows in the same order, or their replica choices differ. A member takes part in one
exchange at a time: with its next share, those that it was part of are given up, for their rest will never come.
"""

from collections import OrderedDict
from dataclasses import dataclass, field

import torch
from torch import Tensor

from shared.errors import BadFrame
from shared.exchange_frames import Share
from shared.transport.base import Header

MOST_OPEN = 32
"""Exchanges that wait for shares; each holds its rows in memory."""


@dataclass
class Assembly:
    """One exchange of a group."""

    rows: Tensor
    """[total, hidden], as far as shares have come."""
    members: int
    asked: dict[int, Header] = field(default_factory=dict)
    """What each member has sent, by its incarnation."""
    firsts: dict[int, int] = field(default_factory=dict)
    """Number of the first row of each member."""

    def takes(self, header: Header, share: Share) -> bool:
        """Whether this share fits the others: the same exchange, and other rows of it."""
        end = share.first + header.rows
        for sender, asked in self.asked.items():
            first = self.firsts[sender]
            alike = (asked.placement, asked.live, asked.kind) == (header.placement, header.live, header.kind)
            if not alike or (share.first < first + asked.rows and first < end):
                return False
        return len(self.rows) == share.total and self.members == share.members

    @property
    def complete(self) -> bool:
        return len(self.asked) == self.members and sum(h.rows for h in self.asked.values()) == len(self.rows)


class Assemblies:
    """All that are open, by (group, layer). ``dtype``: what rows are kept in."""

    def __init__(self, dtype: torch.dtype, max_rows: int) -> None:
        self._open: OrderedDict[tuple[int, int], Assembly] = OrderedDict()
        self._newest: dict[int, int] = {}
        """Sequence of each sender's last share."""
        self._dtype = dtype
        self._max_rows = max_rows

    def add(self, header: Header, share: Share, rows: Tensor) -> Assembly | None:
        """Take a copy of a member's rows. Returns the exchange when these were the last of it.

        A late copy of an earlier share changes nothing.

        Raises BadFrame when the share does not fit the others.
        """
        if not 0 < share.total <= self._max_rows or share.first + header.rows > share.total or not header.rows:
            raise BadFrame(f"{header.rows} rows from {share.first} on are no share of {share.total}")
        if header.sequence <= self._newest.get(header.sender, 0):
            return None
        self._newest[header.sender] = header.sequence
        self._give_up(header.sender)
        key = header.group, header.layer
        assembly = self._open.get(key)
        if assembly is None:
            room = torch.empty(share.total, rows.shape[1], dtype=self._dtype, device=rows.device)
            assembly = self._open[key] = Assembly(room, share.members)
        if not assembly.takes(header, share):
            raise BadFrame("members of a group disagree about its rows")
        assembly.rows[share.first : share.first + header.rows] = rows
        assembly.asked[header.sender], assembly.firsts[header.sender] = header, share.first
        if assembly.complete:
            return self._open.pop(key)
        while len(self._open) > MOST_OPEN:
            self._open.popitem(last=False)
        return None

    def forget(self, sender: int) -> None:
        """It is gone."""
        self._newest.pop(sender, None)
        self._give_up(sender)

    def _give_up(self, sender: int) -> None:
        for key in [key for key, assembly in self._open.items() if sender in assembly.asked]:
            del self._open[key]
