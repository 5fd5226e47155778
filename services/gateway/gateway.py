"""The use cases of the API: a parsed request becomes jobs, the jobs' pieces become an answer.

Knows of HTTP only the errors; routes are in app.py.
"""

import asyncio
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import aclosing
from dataclasses import replace
from typing import Any

from services.gateway.answers import Answer, Prompt
from services.gateway.chats import ChatAnswer
from services.gateway.choices import Choices, Piece
from services.gateway.completions import CompletionAnswer
from services.gateway.errors import ApiError, BadRequest, Unavailable
from services.gateway.metrics import GatewayMetrics, Timing
from services.gateway.protocol import (
    ChatMessage,
    ChatRequest,
    CompletionRequest,
    DetokenizeRequest,
    Templated,
    TokenizeRequest,
)
from services.gateway.requests import Job
from services.gateway.router import Router
from services.gateway.sampling import (
    Limits,
    check_prompt,
    check_tokens,
    output_limit,
    sampling_params,
)
from services.gateway.served import ServedModel
from services.gateway.tally import Tally
from shared.config import GatewayConfig
from shared.telemetry import Telemetry, extract, inject

DRAIN_POLL_S = 0.05


class Gateway:
    """All that the routes need, made once in main.py."""

    def __init__(self, config: GatewayConfig, model: ServedModel, router: Router, telemetry: Telemetry) -> None:
        self.model = model
        self.router = router
        self.telemetry = telemetry
        self.metrics = GatewayMetrics(router.counts)
        self.tally = Tally()
        self._config = config
        self._choices = Choices(router, model.tokenizer, model.limits.eos)
        self._open = 0
        telemetry.collect(self.metrics.samples)

    def check_model(self, name: str | None) -> None:
        """Raises ApiError 404 for any name but ours; no name means ours."""
        if name is not None and name != self.model.name:
            raise ApiError(
                404, f"the model {name[:200]!r} does not exist; this server has {self.model.name!r}",
                "model", "model_not_found",
            )  # fmt: skip

    def check_ready(self) -> None:
        if reason := self.router.not_ready():
            raise Unavailable(f"the mesh is not ready: {reason}", "not_ready")

    def limits(self) -> Limits:
        """The model's limits under what the mesh and the settings allow now."""
        model = self.model.limits
        bounds = (model.context, self._config.max_model_len, self.router.context_length())
        return replace(model, context=min(b for b in bounds if b))

    # ---- generation ---------------------------------------------------------------------------------------

    async def completion(self, request: CompletionRequest) -> tuple[CompletionAnswer, list[Job]]:
        """Raises ApiError for anything that is wrong with the request."""
        self._check(request)
        limits = self.limits()
        prompts = [await self._prompt(p) for p in request.prompts]
        return CompletionAnswer(request, self.model, prompts), self._jobs(request, prompts, limits, "prompt")

    async def chat(self, request: ChatRequest) -> tuple[ChatAnswer, list[Job]]:
        """Raises ApiError for anything that is wrong with the request."""
        self._check(request)
        limits = self.limits()
        prompts = [await self._chat_prompt(request.messages, request)]
        return ChatAnswer(request, self.model, prompts), self._jobs(request, prompts, limits, "messages")

    async def pieces(self, jobs: Sequence[Job], headers: Mapping[str, str], name: str) -> AsyncGenerator[Piece, None]:
        """Run jobs under one span, within the bound on open requests. Closing the generator cancels them."""
        self._admit(jobs)
        timing = Timing(self.metrics, self.tally, jobs)
        deadline = asyncio.get_running_loop().time() + self._config.request_deadline
        outcome: str | None = "error"
        span = self.telemetry.start(name, extract(headers))
        traced = [replace(job, trace=inject(span)) for job in jobs]
        try:
            async with aclosing(self._choices.run(traced, deadline)) as pieces:
                async for piece in pieces:
                    timing.piece(piece)
                    yield piece
            outcome = None
        except (asyncio.CancelledError, GeneratorExit):
            outcome = "cancelled"
            raise
        finally:
            self._open -= len(jobs)
            if outcome:  # finished choices have been counted by their own reasons
                self.metrics.outcomes[outcome] += 1
            timing.end()
            span.end()

    async def drain(self, seconds: float) -> None:
        """Let open requests finish for so long; what is left then ends with an error that says why."""
        loop = asyncio.get_running_loop()
        give_up = loop.time() + seconds
        while self._open and loop.time() < give_up:  # noqa: ASYNC110
            await asyncio.sleep(DRAIN_POLL_S)
        self._choices.end_all(Unavailable("this server is stopping; the answer is not complete", "draining"))

    def _check(self, request: CompletionRequest | ChatRequest) -> None:
        request.check()
        self.check_model(request.model)
        check_tokens(request, self.model.limits)
        self.check_ready()

    def _jobs(
        self, request: CompletionRequest | ChatRequest, prompts: list[Prompt], limits: Limits, param: str
    ) -> list[Job]:
        n = request.choices
        if n * len(prompts) > self._config.max_queue:
            raise BadRequest(f"n: more than {self._config.max_queue} choices in one request", "n")
        jobs = []
        for number, prompt in enumerate(prompts):
            check_prompt(prompt.ids, limits, param)
            max_tokens = output_limit(request, len(prompt.ids), limits)
            for child in range(n):
                sampling = sampling_params(request, max_tokens, child, limits)
                jobs.append(Job(number * n + child, prompt.ids, sampling, request.stops, request.skips_special))
        self.metrics.prompt_tokens += sum(len(prompt.ids) for prompt in prompts)
        return jobs

    def _admit(self, jobs: Sequence[Job]) -> None:
        if self._open + len(jobs) > self._config.max_queue:
            self.tally.refuse(len(jobs), sum(len(job.prompt) for job in jobs))
            raise Unavailable(f"the server is full: {self._open} requests are open", "full")
        self._open += len(jobs)

    async def _prompt(self, prompt: str | list[int]) -> Prompt:
        if isinstance(prompt, str):
            return Prompt(await self.model.tokenizer.encode(prompt, special=True), prompt)
        return Prompt(prompt)

    async def _chat_prompt(self, messages: Sequence[ChatMessage], how: Templated) -> Prompt:
        plain = [message.plain() for message in messages]
        text = self.model.template.render(plain, how.chat_template_kwargs or {}, how.turn)
        return Prompt(await self.model.tokenizer.encode(text, special=False), text)

    # ---- tokens and models --------------------------------------------------------------------------------

    async def tokenize(self, request: TokenizeRequest) -> dict[str, Any]:
        request.check()
        self.check_model(request.model)
        if request.messages is not None:
            ids = (await self._chat_prompt(request.messages, request)).ids
        else:
            special = request.add_special_tokens is not False
            ids = await self.model.tokenizer.encode(request.prompt or "", special)
        found: dict[str, Any] = {"count": len(ids), "max_model_len": self.limits().context, "tokens": ids}
        if request.return_token_strs:
            found["token_strs"] = [self.model.tokenizer.token_text(i) for i in ids]
        return found

    def detokenize(self, request: DetokenizeRequest) -> dict[str, Any]:
        self.check_model(request.model)
        if request.tokens:
            check_prompt(request.tokens, self.model.limits, "tokens")
        return {"prompt": self.model.tokenizer.decode(request.tokens, skip_special=False)}

    def model_card(self) -> dict[str, Any]:
        return {
            "id": self.model.name,
            "object": "model",
            "created": self.model.created,
            "owned_by": "moemesh",
            "root": self.model.name,
            "parent": None,
            "max_model_len": self.limits().context,
        }


def collect(answer: Answer[Any], pieces: Sequence[Piece]) -> dict[str, Any]:
    """The plain answer made of all pieces."""
    return answer.whole([choice for piece in pieces for choice in answer.take(piece)])
