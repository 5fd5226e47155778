"""``/v1/chat/completions``: what its choices look like, as messages and deltas."""

from services.gateway.answers import Answer, Json, joined
from services.gateway.choices import Piece
from services.gateway.logprobs import chat_logprobs
from services.gateway.protocol import ChatRequest


class ChatAnswer(Answer[ChatRequest]):
    prefix = "chatcmpl"
    chunk_object = "chat.completion.chunk"
    whole_object = "chat.completion"

    def pieces(self, piece: Piece, first: bool) -> list[Json]:
        chunks = []
        if first:
            chunks.append(_chunk(piece.index, {"role": "assistant", "content": ""}))
        if self.visible(piece, first):
            chunk = _chunk(piece.index, {"content": piece.text} if piece.text else {})
            if self.request.logprobs:
                count = self.request.top_logprobs or 0
                chunk["logprobs"] = chat_logprobs(self.model.tokenizer, piece.tokens, piece.logprobs, count)
            chunk |= {"finish_reason": piece.finish, "stop_reason": piece.stop_reason} | self.token_ids(piece)
            chunks.append(chunk)
        return chunks

    def fold(self, choices: list[Json]) -> Json:
        content = "".join(c["delta"].get("content", "") for c in choices)
        last = choices[-1]
        whole: Json = {
            "index": last["index"],
            "message": {"role": "assistant", "content": content, "refusal": None},
            "logprobs": None,
            "finish_reason": last["finish_reason"],
            "stop_reason": last["stop_reason"],
        }
        if self.request.logprobs:
            parts = [c["logprobs"] for c in choices if c["logprobs"]]
            whole["logprobs"] = {"content": joined(parts, "content"), "refusal": None}
        if self.request.return_token_ids:
            whole["token_ids"] = joined(choices, "token_ids")
        return whole

    def extras(self) -> Json:
        return {"prompt_token_ids": self.prompts[0].ids} if self.request.return_token_ids else {}


def _chunk(index: int, delta: Json) -> Json:
    return {"index": index, "delta": delta, "logprobs": None, "finish_reason": None}
