"""Brings choices to attention instances and their tokens back, whatever happens on the way.

Chooses an instance, submits, notices gaps and silence, asks for repeats, and moves a request with all its tokens to
another instance when its own is gone: a sampled token depends only on logits, seed and position, so the stream goes on
as if nothing had happened. Knows token ids only; text begins in choices.py.
"""

import asyncio
from collections import Counter
from collections.abc import AsyncGenerator

from services.gateway.acks import Acks
from services.gateway.errors import Unavailable
from services.gateway.requests import Job, OpenRequest, Update
from services.gateway.routing import context_length, experts_are_seen_to, not_ready, ranked
from shared.bus import Bus
from shared.errors import BusUnavailable, Refused
from shared.membership import Member, Members
from shared.messages import Subjects
from shared.request_messages import Decision, Resend, TokenDelta, Tokens

SILENCE_S = 1.0
MAX_SILENCE_S = 4.0
"""Silence may be a long queue: the wait between two questions grows up to this."""
SUBMIT_TIMEOUT_S = 5.0
RESEND_TIMEOUT_S = 2.0
STRIKE_S = 0.5
"""Wait before the next question to an instance that did not answer the last one."""
RETRY_S = 0.25
STRIKES = 3
"""Questions in a row that an instance leaves unanswered before its requests move on."""
MAX_PLACEMENTS = 6
"""Instances that one request may lose, so that a request that kills instances ends."""
CLOSE_LIMIT_S = 2.0
ELSEWHERE = frozenset({"full", "draining", "no_experts"})
MOVE_ON = frozenset({"draining", "no_experts", "unknown"})


class Router:
    """The table of open requests. ``start`` it once the bus is connected.

    Args:
        id: this gateway's instance id; tokens come to its subject.
        digest: model digest that an attention instance must have.
        patience: seconds that a request which lost its instance waits for another one.
    """

    def __init__(self, bus: Bus, members: Members, mesh: str, id: str, digest: str, patience: float) -> None:
        self._bus = bus
        self._members = members
        self._subjects = Subjects(mesh)
        self._id = id
        self._digest = digest
        self._patience = patience
        self._open: set[OpenRequest] = set()
        self._placed: dict[str, OpenRequest] = {}
        """Request id -> request that an instance has."""
        self._acks = Acks(bus, self._subjects, id)
        self._acking: asyncio.Task[None] | None = None

    async def start(self) -> None:
        await self._bus.subscribe(self._subjects.tokens(self._id), Tokens, self._on_tokens, ordered=True)
        self._members.on_change(self._on_members)
        self._bus.on_connection(self._on_connection)
        self._acking = asyncio.create_task(self._acks.run())

    async def close(self) -> None:
        if self._acking:
            self._acking.cancel()
        await self._acks.close(CLOSE_LIMIT_S)

    # ---- what the HTTP side asks --------------------------------------------------------------------------

    def not_ready(self) -> str | None:
        """Why no request can be served now, for a person; None when one can."""
        if not self._bus.connected:
            return "NATS is away"
        return not_ready(self._members.all(), self._digest)

    def context_length(self) -> int | None:
        """Longest prompt + output, in tokens; None while no instance is usable."""
        return context_length(self._members.all(), self._digest)

    def counts(self) -> tuple[int, int]:
        """(choices that an instance has, choices that none has)."""
        return len(self._placed), len(self._open) - len(self._placed)

    async def run(self, job: Job, deadline: float) -> AsyncGenerator[Update, None]:
        """The output of one choice; ends after an update with ``finish``. Closing it early cancels the choice.

        Args:
            deadline: loop time until which the attention instance may work; the caller enforces it here.

        Raises Unavailable or Refused when nobody takes the request, and Refused when the instance gives it up.
        """
        request = OpenRequest(job)
        self._open.add(request)
        try:
            await self._place(request, deadline)
            for _ in range(MAX_PLACEMENTS):
                while update := await self._next(request):
                    yield update
                    if update.finish:
                        return
                await self._place_again(request, deadline)
            raise Unavailable("the attention instances that had this request went away, one after the other")
        finally:
            self._open.discard(request)
            self._leave(request)

    # ---- one request --------------------------------------------------------------------------------------

    async def _place(self, request: OpenRequest, deadline: float) -> None:
        """Submit to the best instance that takes it. Raises Unavailable, BusUnavailable or Refused."""
        failure: Exception | None = None
        for member in self._candidates():
            try:
                await self._submit(request, member, deadline)
                return
            except BusUnavailable as error:
                failure = error
                self._leave(request)  # it may have the request all the same
            except Refused as error:
                self._detach(request)
                if error.code not in ELSEWHERE:
                    raise
                failure = error
        raise failure or Unavailable(self.not_ready() or "no attention instance is ready")

    async def _place_again(self, request: OpenRequest, deadline: float) -> None:
        """As `_place`, for a request that was under way: its instance may be replaced soon, so it waits for that."""
        self._leave(request)
        loop = asyncio.get_running_loop()
        give_up = loop.time() + self._patience
        while True:
            try:
                await self._place(request, deadline)
                return
            except (Unavailable, BusUnavailable, Refused) as error:
                if isinstance(error, Refused) and error.code not in ELSEWHERE:
                    raise
                if loop.time() >= give_up:
                    raise Unavailable(f"lost its attention instance and found no other one: {error}", "lost") from error
            await asyncio.sleep(RETRY_S)

    async def _submit(self, request: OpenRequest, member: Member, deadline: float) -> None:
        request.assign(member.id, member.heartbeat.incarnation)
        self._placed[request.id] = request  # tokens may come before the decision
        left = max(deadline - asyncio.get_running_loop().time(), 0.001)
        subject = self._subjects.attention(member.id, "submit")
        may_wait = experts_are_seen_to(self._members.all())
        for message in request.submits(self._id, left, may_wait):
            decision = await self._bus.request(subject, message, Decision, min(SUBMIT_TIMEOUT_S, left))
            if not decision.ok:
                raise Refused(decision.code or "internal", decision.message)

    async def _next(self, request: OpenRequest) -> Update | None:
        """The next news of a request; None when it has to go elsewhere."""
        while True:
            if update := request.log.take():
                return update
            if request.log.finish:
                return self._ended_badly(request)
            if request.lost or request.strikes >= STRIKES:
                return None
            heard = await request.wait(_patience(request))
            if not heard or request.gap:
                await self._resend(request)

    def _ended_badly(self, request: OpenRequest) -> None:
        """The instance gave the request up: raises Refused unless another one may do better."""
        error = request.log.error
        if request.log.finish == "error" and (error is None or error.code not in MOVE_ON):
            raise Refused((error and error.code) or "internal", error.message if error else "")

    async def _resend(self, request: OpenRequest) -> None:
        """Ask for the tokens that are missing; no answer is a strike against the instance."""
        if request.target is None or not self._bus.connected:
            return
        request.silence = min(request.silence + 1, 8)
        request.gap = False
        message = Resend(request_id=request.id, position=len(request.log.tokens))
        subject = self._subjects.attention(request.target, "resend")
        try:
            decision = await self._bus.request(subject, message, Decision, RESEND_TIMEOUT_S)
        except BusUnavailable:
            request.strikes += self._bus.connected
            return
        request.strikes = 0
        if decision.code == "unknown":
            request.lose()

    def _leave(self, request: OpenRequest) -> None:
        """The instance shall forget the request: it is over, or it goes elsewhere."""
        target, finished = request.target, request.log.finish
        self._detach(request)
        if target and finished:
            self._acks.done(target, request.id)
        elif target:
            self._acks.cancel(target, request.id)

    def _detach(self, request: OpenRequest) -> None:
        self._placed.pop(request.id, None)
        request.target = None

    def _candidates(self) -> list[Member]:
        load: Counter[str] = Counter()
        for request in self._placed.values():
            if request.target:
                load[request.target] += request.outstanding
        return ranked(self._members.all(), self._digest, load)

    # ---- what comes in ------------------------------------------------------------------------------------

    def _on_tokens(self, message: Tokens) -> None:
        for delta in message.deltas:
            if request := self._placed.get(delta.request_id):
                request.receive(delta)
                self._acks.received(message.attention, request.id, len(request.log.tokens))
            else:
                self._unwanted(message.attention, delta)

    def _unwanted(self, instance: str, delta: TokenDelta) -> None:
        """Tokens of a request that is over, or that went elsewhere."""
        if delta.finish:
            self._acks.done(instance, delta.request_id)
        else:
            self._acks.cancel(instance, delta.request_id)

    def _on_members(self) -> None:
        for request in list(self._placed.values()):
            member = self._members.get(request.target or "")
            if member is None or member.heartbeat.incarnation != request.incarnation:
                self._acks.forget(request.target or "")
                request.lose()

    def _on_connection(self, connected: bool) -> None:
        """NATS is back: what was sent meanwhile is lost, so everybody asks at once."""
        for request in self._placed.values() if connected else ():
            request.suspect_gap()


def _patience(request: OpenRequest) -> float:
    """Seconds of silence before the next question."""
    return STRIKE_S if request.strikes else min(SILENCE_S * 2**request.silence, MAX_SILENCE_S)
