"""Groups over the data plane: joins and their answers, members' rows to the leader, sums back.

Decides nothing about experts. Whatever goes wrong breaks the group: its members go on alone until their step ends, and
nothing of the result depends on it.
"""

import logging
import struct
import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from torch import Tensor

from services.attention.exchange import Neighbour
from services.attention.groups import Group, Join, Meeting, Observed, Patience, longest_wait, patience_for
from services.attention.links import pong
from services.attention.ways import APART, Way
from shared.errors import TransportError
from shared.exchange_frames import Flag
from shared.transport.base import DTYPES, FrameKind, Header, Incoming, Peer, Transport

Pump = Callable[[float], bool]
"""Takes one frame, or waits so many seconds for one; False when none came."""
ChooseWay = Callable[[int, int], Way]
"""rows of all members, number of members."""
Learn = Callable[[Observed], None]
MOST_QUEUED = 256
MOST_DISSOLVED = 16
SLICE_S = 0.05  # how often who waits looks whether a connection broke

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Standing:
    """What all members of a group must have in common."""

    placement: int
    live: int


class Lockstep:
    """The groups of one attention instance; belongs to the compute thread.

    Args:
        mesh, incarnation: what frames are signed with.
        max_rows: of an exchange.
        share: of the last step, how long a meeting waits for others; 0: no groups.
        pump: see ``Pump``; hands frames of groups to ``take``.
        choose: the way of a group.
        learn: what groups took in which this instance, their meeting place, had no part, and what the exchanges of
            other members took that were their own.
    """

    def __init__(
        self, transport: Transport, *, mesh: int, incarnation: int, max_rows: int, share: float,
        pump: Pump, choose: ChooseWay, learn: Learn,
    ) -> None:  # fmt: skip
        self._transport = transport
        self._mesh, self._me = mesh, incarnation
        self._max_rows, self._share = max_rows, share
        self._pump, self._choose, self._learn = pump, choose, learn
        self._meeting = Meeting(max_rows)
        self._patience = Patience()
        self._peers: dict[int, Peer] = {}
        self._order: list[int] = []
        self._standing = Standing(0, 0)
        self._joins = 0
        self._observed: Observed | None = None
        """To be told with the next join."""
        self._asked: Join | None = None
        """Ours, while its answer is awaited."""
        self._attended = False
        self._dissolved: deque[int] = deque(maxlen=MOST_DISSOLVED)
        """Groups that others have left, perhaps before we are told that we are in them."""
        self._rows = 0
        """Of the step that is under way; 0 between steps."""
        self._began = self._last = 0.0
        self._shares: dict[int, Incoming] = {}
        """By sender: its newest rows, kept until the next ones so that late copies are known."""
        self.group: Group | None = None
        """Of the step that is under way; None when this instance is alone."""
        self.formed = self.broken = 0
        """How many groups there were, and how many of them broke."""

    # ---- membership -------------------------------------------------------------------------------------

    def meet(self, neighbours: Mapping[str, Neighbour]) -> list[Peer]:
        """The attention instances of this node, ourselves included, by id; between steps. Returns new ones."""
        new = []
        names = {n.incarnation for n in neighbours.values()} - {self._me}
        for gone in self._peers.keys() - names:
            self._transport.disconnect(self._peers.pop(gone))
        self._meeting.leave(self._meeting.newest.keys() - names - {self._me})
        for neighbour in neighbours.values():
            if neighbour.incarnation not in self._peers and neighbour.incarnation != self._me:
                try:
                    peer = self._peers[neighbour.incarnation] = self._transport.connect(neighbour.address)
                except TransportError as error:
                    log.warning("cannot connect to an attention instance of this node: %s", error)
                    continue
                new.append(peer)
        known = [neighbours[name].incarnation for name in sorted(neighbours)]
        self._order = [i for i in known if i in self._peers or i == self._me]
        return new

    def lost(self, incarnation: int) -> bool:
        """True when nothing can come from a member any more."""
        peer = self._peers.get(incarnation)
        return peer is None or not peer.alive

    @property
    def _host(self) -> int:
        """Whose meeting it is."""
        return next((i for i in self._order if i == self._me or not self.lost(i)), self._me)

    # ---- a step -----------------------------------------------------------------------------------------

    def begin(self, rows: int, standing: Standing) -> Group | None:
        """A step of so many rows begins: meet the others. Returns the group, None when this instance is alone."""
        self._standing, self._began = standing, time.monotonic()
        self.group, self._attended = None, False
        if len(self._order) > 1 and self._share and 0 < rows < self._max_rows:
            host = self._host
            if host == self._me:
                self.group = self._host_meeting(rows)
            elif self._patience.goes():
                self._attended = True
                self._attend(host, rows)
        self._rows = rows
        self.formed += self.group is not None
        return self.group

    def end(self, observed: Observed | None) -> None:
        """The step is over, and took so long."""
        apart = observed is not None and observed.way == APART  # nobody else knows what our exchanges took
        tells = self.group is not None and self._me != self._host and (apart or self.group.leader == self._me)
        self._observed = observed if tells else None
        self._last = time.monotonic() - self._began
        if self._attended:
            self._patience.came_back(self.group is not None)
        self._rows = 0
        self.group = None
        for share in self._shares.values():
            share.release()
        self._shares.clear()

    def leave(self) -> None:
        """Break the group: everybody goes on alone."""
        if self.group is not None:
            self.broken += 1
            self._excuse(self.group)
            self.group = None

    def _wait_s(self) -> float:
        return longest_wait(self._share, self._last)

    def _host_meeting(self, rows: int) -> Group | None:
        for _ in range(MOST_QUEUED):
            if not self._pump(0.0):
                break
        now = time.monotonic()
        self._meeting.join(self._join(rows, now + 1.0), now, self._wait_s())
        self._meeting.due = now + self._wait_s()  # those who came during our last step have waited anyway
        while not self._meeting.complete(now := time.monotonic()):
            self._pump(self._meeting.due - now)
        return self._form(now)

    def _join(self, rows: int, until: float) -> Join:
        self._joins += 1
        return Join(self._me, self._joins, rows, self._standing.placement, self._standing.live, until)

    def _attend(self, host: int, rows: int) -> None:
        """Ask for a group; alone when there is no answer in time."""
        patience = 2 * self._wait_s()
        self._asked = join = self._join(rows, time.monotonic() + patience)
        meta = Join.pack(rows, patience) + (self._observed.pack() if self._observed else b"")
        self._send([self._peers[host]], FrameKind.JOIN, meta, sequence=join.number)
        while self._asked and (left := self._asked.until - time.monotonic()) > 0 and not self.lost(host):
            self._pump(min(left, SLICE_S))
        self._asked = None

    def serve(self) -> float:
        """Between steps, without work: form a group of others that is due. Returns seconds until the next is."""
        now = time.monotonic()
        if self._meeting.complete(now):
            self._form(now)
        return max(0.0, self._meeting.due - now) if self._meeting.joins else float("inf")

    def _form(self, now: float) -> Group | None:
        """Tell everybody who has come; returns our own group."""
        mine = None
        for joins in self._meeting.form(self._order, now):
            members = tuple((join.incarnation, join.rows) for join in joins)
            if len(members) == 1:
                self._tell(joins[0], b"", 0)
                continue
            number = int.from_bytes(struct.pack("<d", now), "little") ^ self._me ^ members[0][0]
            way = self._choose(sum(join.rows for join in joins), len(members))
            group = Group(number, members, way, joins[0].placement, joins[0].live)
            for join in joins:
                self._tell(join, group.pack(), number)
                mine = group if join.incarnation == self._me else mine
        return mine

    def _tell(self, join: Join, meta: bytes, number: int) -> None:
        if join.incarnation in self._peers:
            header = self._header(FrameKind.GROUP, join.number, number)
            header.placement, header.live = join.placement, join.live
            self._send_to([self._peers[join.incarnation]], header, meta)

    # ---- rows and sums ----------------------------------------------------------------------------------

    def send_rows(self, group: Group, sequence: int, layer: int, rows: Tensor, prefill: bool) -> None:
        """A member's rows to the leader; ``prefill``: of a step that computes prompts."""
        frame = self._transport.outgoing(0, len(rows), rows.shape[1], rows.dtype)
        frame.rows.copy_(rows)
        header = self._header(FrameKind.DISPATCH, sequence, group.number, layer)
        header.flags = Flag.PREFILL if prefill else 0
        self._transport.send([self._peers[group.leader]], header, frame)

    def collect(self, group: Group, layer: int, own: Tensor, whole: Tensor, deadline: float) -> bool:
        """The leader's part: all members' rows to ``whole`` [T, H]. False when the group broke, or time is over."""
        others = [i for i, _ in group.members if i != self._me]
        while missing := [i for i in others if self._kept(group, layer, i) is None]:
            left = deadline - time.monotonic()
            if self.group is not group or left <= 0 or any(self.lost(i) for i in missing):
                return False
            self._pump(min(left, SLICE_S))
        first = 0
        for incarnation, rows in group.members:
            share = self._kept(group, layer, incarnation)
            theirs = own if share is None else share.rows
            if theirs.shape != (rows, whole.shape[1]):
                return False
            whole[first : first + rows] = theirs
            first += rows
        return True

    def prefills(self, group: Group, layer: int) -> bool:
        """Whether a member has given rows of a step that computes prompts."""
        given = (self._kept(group, layer, incarnation) for incarnation, _ in group.members)
        return any(share.header.flags & Flag.PREFILL for share in given if share is not None)

    def scatter(self, group: Group, layer: int, total: Tensor) -> None:
        """The leader's part: to each member the sums of its rows, of ``total`` fp32 [T, H]."""
        first = 0
        for incarnation, rows in group.members:
            share, peer = self._kept(group, layer, incarnation), self._peers.get(incarnation)
            if share is not None and peer is not None:
                frame = self._transport.outgoing(0, rows, total.shape[1], total.dtype)
                frame.rows.copy_(total[first : first + rows])
                header = self._header(FrameKind.SUM, share.header.sequence, group.number, layer)
                self._transport.send([peer], header, frame)
            first += rows

    def _kept(self, group: Group, layer: int, incarnation: int) -> Incoming | None:
        """The rows of a member for an exchange; None as long as they are not here."""
        share = self._shares.get(incarnation)
        here = share is not None and (share.header.group, share.header.layer) == (group.number, layer)
        return share if here else None

    # ---- frames -----------------------------------------------------------------------------------------

    def take(self, incoming: Incoming) -> str:
        """A frame of a group. Returns why it is dropped, "" when it was taken; kept ones are released here later."""
        header = incoming.header
        if header.sender not in self._peers:
            return "foreign"
        if header.kind == FrameKind.DISPATCH:
            return self._keep_share(incoming)
        if header.kind == FrameKind.PING:
            pong(self._transport, self._peers[header.sender], header, self._mesh, self._me)
            incoming.release()
            return ""
        problem = ""
        try:
            if header.kind == FrameKind.JOIN:
                self._take_join(header, incoming.meta.tobytes())
            elif header.kind == FrameKind.GROUP:
                self._take_group(header, incoming.meta.tobytes())
            elif header.kind == FrameKind.LEAVE:
                self._take_leave(header)
            else:
                problem = "unexpected"
        except (struct.error, ValueError, IndexError):
            return "malformed"
        if not problem:
            incoming.release()
        return problem

    def _keep_share(self, incoming: Incoming) -> str:
        header, group = incoming.header, self.group
        ours = group is not None and group.number == header.group and group.leader == self._me
        if not ours and not self._asked:  # while it is awaited, the meeting's answer may come after the first rows
            self._send([self._peers[header.sender]], FrameKind.LEAVE, b"", group=header.group)
            return "late"
        before = self._shares.get(header.sender)
        if before is not None:
            if before.header.sequence >= header.sequence:
                return "duplicate"
            before.release()
        self._shares[header.sender] = incoming
        return ""

    def _take_join(self, header: Header, meta: bytes) -> None:
        rows, patience = Join.unpack(meta[: Join.LAYOUT.size])
        observed = Observed.unpack(rest) if (rest := meta[Join.LAYOUT.size :]) else None
        now = time.monotonic()
        later = self._rows and self._rows + rows <= self._max_rows
        patience = patience_for(self._last) if later else patience
        join = Join(header.sender, header.sequence, rows, header.placement, header.live, now + patience)
        new = self._meeting.join(join, now, self._wait_s())
        if new and observed:
            self._learn(observed)
        if new and later:
            meta = Join.pack(rows, patience)
            self._send([self._peers[header.sender]], FrameKind.GROUP, meta, sequence=header.sequence)

    def _take_group(self, header: Header, meta: bytes) -> None:
        """The meeting's answer: a group, nobody (empty), or a later time at which there will be one."""
        asked = self._asked if self._asked and self._asked.number == header.sequence else None
        if len(meta) == Join.LAYOUT.size:
            if asked:
                self._asked = asked._replace(until=time.monotonic() + Join.unpack(meta)[1])
            return
        group = Group.unpack(header.group, header.placement, header.live, meta) if meta else None
        if asked:
            self._asked = None
        if group and asked and group.number not in self._dissolved and group.suits(asked, self._max_rows, self._peers):
            self.group = group
        elif group and (self.group is None or self.group.number != group.number):  # not a second copy of the answer
            self._excuse(group)  # it comes too late, and we have begun already; or we cannot reach all of them

    def _excuse(self, group: Group) -> None:
        others = [self._peers[i] for i, _ in group.members if i in self._peers]
        self._send(others, FrameKind.LEAVE, b"", group=group.number)

    def _take_leave(self, header: Header) -> None:
        if self.group is not None and self.group.number == header.group:
            self.broken += 1
            self.group = None
        self._dissolved.append(header.group)

    def _header(self, kind: FrameKind, sequence: int, group: int, layer: int = 0) -> Header:
        standing = self._standing
        return Header(
            kind, self._mesh, self._me, sequence, group=group, placement=standing.placement, live=standing.live,
            layer=layer,
        )  # fmt: skip

    def _send(
        self,
        peers: list[Peer],
        kind: FrameKind,
        meta: bytes,
        group: int = 0,
        sequence: int = 0,
    ) -> None:
        self._send_to(peers, self._header(kind, sequence, group), meta)

    def _send_to(self, peers: list[Peer], header: Header, meta: bytes) -> None:
        frame = self._transport.outgoing(len(meta), 0, 0, DTYPES[0])
        frame.meta[:] = memoryview(meta)
        self._transport.send(peers, header, frame)
