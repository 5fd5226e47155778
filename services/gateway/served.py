"""The model as the API sees it: name, tokenizer, chat template, vocabulary, defaults. Never its weights."""

import time
from dataclasses import dataclass, field

from services.gateway.chat import ChatTemplate, special_tokens
from services.gateway.sampling import Limits, generation_defaults
from services.gateway.tokenizer import Tokenizer
from shared.models.source import ModelSource


@dataclass(frozen=True)
class ServedModel:
    name: str
    """In the API."""
    digest: str
    tokenizer: Tokenizer
    template: ChatTemplate
    limits: Limits
    """``context`` is the model's own; the mesh may allow less."""
    created: int = field(default_factory=lambda: int(time.time()))

    @property
    def fingerprint(self) -> str:
        return f"moemesh-{self.digest[:12]}"


def served_model(source: ModelSource, name: str) -> ServedModel:
    """Raises ModelError for an unusable tokenizer, template or generation config."""
    generation = source.generation_config
    max_new_tokens = generation.get("max_new_tokens")
    limits = Limits(
        context=source.spec.max_positions,
        vocab=source.spec.vocab_size,
        eos=source.spec.eos_ids,
        defaults=generation_defaults(generation),
        max_new_tokens=max_new_tokens if isinstance(max_new_tokens, int) and max_new_tokens > 0 else None,
    )
    return ServedModel(
        name=name or source.name,
        digest=source.digest,
        tokenizer=Tokenizer(source.tokenizer_file),
        template=ChatTemplate(source.chat_template, special_tokens(source.tokenizer_config)),
        limits=limits,
    )
