"""Exchanges that wait until their experts are resident, while others are answered.

Runs in the compute thread. An exchange is computed piece by piece, as its experts come, so that it needs no more of
them at a time than there are slots.
"""

import time
from collections.abc import Container, Iterator
from dataclasses import dataclass, field

from torch import Tensor

from services.experts.answers import Answers, KnownPlacement, Prepared, Refused
from services.experts.assembly import Assembly
from services.experts.compute import Plan
from services.experts.elastic import BrokenExpert, Elastic, Progress
from services.experts.relay import MICRO_BATCHES
from shared.exchange_frames import Flag
from shared.transport.base import Header, Incoming, Peer, Refusal

PATIENCE_S = 30.0
"""Nobody waits for experts longer: who asked has given up before."""


@dataclass(eq=False)
class Question:
    """A frame that is to be answered."""

    peer: Peer
    incoming: Incoming
    assembly: Assembly | None = None
    """All rows of a group's exchange, if the frame was the last share of one."""
    plan: Plan | None = None
    rows: Tensor | None = None
    """What the plan is about, in the dtype that is computed in."""
    progress: Progress | None = None
    """Set while experts are missing."""
    since: float = field(default_factory=time.monotonic)

    @property
    def prefill(self) -> bool:
        """Whether some of its rows are of a step that computes prompts."""
        asked = self.assembly.asked.values() if self.assembly else (self.incoming.header,)
        return any(header.flags & Flag.PREFILL for header in asked)

    @property
    def prepared(self) -> Prepared | None:
        if self.plan is None:
            return None
        return Prepared(self.plan, self.progress.out if self.progress and self.progress.out.numel() else None)


class Waiting:
    """The questions that wait, oldest first."""

    def __init__(self, elastic: Elastic, answers: Answers) -> None:
        self._elastic, self._answers = elastic, answers
        self._questions: list[Question] = []

    def ready(self, question: Question, placement: KnownPlacement) -> bool:
        """Whether a question can be answered; else it is kept, and what it lacks is started.

        Raises Refused, NoLiveHome, BadFrame.
        """
        header = question.incoming.header
        if question.rows is None:
            given = question.assembly.rows if question.assembly else question.incoming.rows
            question.rows = self._answers.converted(given)
            self._replace(question)
        if question.plan is None:
            question.plan = self._answers.plan(header, question.rows, question.incoming.meta, placement)
            question.progress = self._elastic.begin(header.layer, question.plan)
        progress = question.progress
        try:
            if progress is None or self._elastic.go_on(header.layer, question.rows, progress):
                return True
        except BrokenExpert as error:
            raise Refused(Refusal.NOT_STARTED, str(error)) from error
        self._elastic.demand(header.layer, progress)
        if time.monotonic() - progress.since > PATIENCE_S:
            raise Refused(Refusal.NOT_STARTED, f"experts were not started within {PATIENCE_S:g} s")
        self._questions.append(question)
        return False

    def due(self) -> Iterator[Question]:
        """Those to look at again: experts have been started, or it is too late; they have to come back to ``ready``."""
        if self._elastic.collect() or any(time.monotonic() - q.since > PATIENCE_S for q in self._questions):
            again, self._questions = self._questions, []
            yield from again

    def answered(self, question: Question) -> None:
        """Its reply is sent: there is time to look ahead."""
        layer = question.incoming.header.layer
        self._elastic.answered(layer, time.monotonic() - question.since)
        if question.plan and question.rows is not None:
            self._elastic.foresee(layer, question.rows, question.plan.ids, question.prefill)

    @property
    def anybody(self) -> bool:
        """Whether a question waits."""
        return bool(self._questions)

    def forget(self, senders: Container[int]) -> None:
        """They are gone."""
        for question in [q for q in self._questions if q.incoming.header.sender in senders]:
            self._drop(question)

    def _drop(self, question: Question) -> None:
        self._questions.remove(question)
        question.incoming.release()

    def _replace(self, question: Question) -> None:
        """A later attempt takes the place of an earlier one, and goes on where that was if it asks the same."""
        new = question.incoming.header
        for old in list(self._questions):
            header = old.incoming.header
            if header.sender == new.sender and header.sequence + MICRO_BATCHES <= new.sequence:
                self._drop(old)  # its sender has given it up
            elif (header.sender, header.sequence) == (new.sender, new.sequence):
                if _asks(header) == _asks(new) and not (old.assembly or question.assembly):
                    question.plan, question.progress = old.plan, old.progress
                self._drop(old)


def _asks(header: Header) -> tuple[int, ...]:
    """What an answer depends on, beside the rows: the same in every attempt at an exchange."""
    return header.kind, header.flags, header.layer, header.rows, header.placement, header.live, header.digest
