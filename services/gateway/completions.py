"""``/v1/completions``: what its choices look like, with echo and parallel logprob lists."""

from services.gateway.answers import Answer, Json, Prompt, joined
from services.gateway.choices import Piece
from services.gateway.logprobs import completion_logprobs
from services.gateway.protocol import CompletionRequest
from services.gateway.served import ServedModel


class CompletionAnswer(Answer[CompletionRequest]):
    prefix = "cmpl"
    chunk_object = whole_object = "text_completion"

    def __init__(self, request: CompletionRequest, model: ServedModel, prompts: list[Prompt]) -> None:
        super().__init__(request, model, prompts)
        self._echoes = [self._prompt_text(p) for p in prompts] if request.echo else []

    def pieces(self, piece: Piece, first: bool) -> list[Json]:
        echo = first and bool(self.request.echo)
        if not echo and not self.visible(piece, first):
            return []
        choice: Json = {
            "index": piece.index,
            "text": (self._echo(piece.index) if echo else "") + piece.text,
            "logprobs": self._logprobs(piece, echo),
            "finish_reason": piece.finish,
            "stop_reason": piece.stop_reason,
        } | self.token_ids(piece)
        if first and self.request.return_token_ids:
            choice["prompt_token_ids"] = self.prompt_of(piece.index).ids
        return [choice]

    def fold(self, choices: list[Json]) -> Json:
        last = choices[-1]
        whole = choices[0] | last | {"text": "".join(c["text"] for c in choices)}
        if self.request.logprobs is not None:
            parts = [c["logprobs"] for c in choices]
            whole["logprobs"] = {field: joined(parts, field) for field in parts[0]}
        if self.request.return_token_ids:
            whole["token_ids"] = joined(choices, "token_ids")
        return whole

    def _echo(self, index: int) -> str:
        return self._echoes[index // self.request.choices]

    def _logprobs(self, piece: Piece, echo: bool) -> Json | None:
        count = self.request.logprobs
        if count is None:
            return None
        before = len(self._echo(piece.index)) if self.request.echo else 0
        shifted = [before + offset for offset in piece.offsets]
        tokenizer = self.model.tokenizer
        found = completion_logprobs(tokenizer, piece.tokens, piece.logprobs, shifted, count)
        if not echo:
            return found
        ids = self.prompt_of(piece.index).ids
        prompt = completion_logprobs(tokenizer, ids, piece.prompt_logprobs, self._offsets(ids), count)
        return {field: prompt[field] + found[field] for field in found}

    def _prompt_text(self, prompt: Prompt) -> str:
        if prompt.text is not None:
            return prompt.text
        return self.model.tokenizer.decode(prompt.ids, self.request.skips_special)

    def _offsets(self, ids: list[int]) -> list[int]:
        """Where each prompt token begins in the prompt's text."""
        detokenizer = self.model.tokenizer.detokenizer([], self.request.skips_special)
        offsets, length = [], 0
        for token in ids:
            offsets.append(length)
            length += len(detokenizer.push(token))
        return offsets
