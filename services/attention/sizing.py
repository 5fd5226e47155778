"""Settings and facts of the model -> the limits of one instance. Pure; a refusal names the setting and what works."""

from services.attention.batching import Limits
from services.attention.kv_cache import blocks_for
from services.attention.micro_batches import MOST
from shared.config import AttentionConfig, parse_bytes
from shared.errors import ConfigError
from shared.models.spec import ModelSpec

POSITIVE = ("max_num_seqs", "max_batched_tokens", "max_waiting", "block_size", "mixed_prefill")


def context_length(config: AttentionConfig, spec: ModelSpec) -> int:
    """Longest sequence in tokens. Raises ConfigError when the model cannot do what was asked."""
    if not 0 <= config.max_model_len <= spec.max_positions:
        raise ConfigError("--max-model-len", f"{config.max_model_len}: this model allows 1 to {spec.max_positions}")
    return config.max_model_len or spec.max_positions


def plan_limits(config: AttentionConfig, spec: ModelSpec, bytes_per_block: int) -> Limits:
    """Raises ConfigError for settings out of range, and when not even one longest sequence fits the KV cache."""
    for name in POSITIVE:
        if getattr(config, name) < 1:
            raise ConfigError("--" + name.replace("_", "-"), f"{getattr(config, name)} is less than 1")
    if config.max_num_seqs > config.max_batched_tokens:
        problem = f"{config.max_num_seqs} sequences do not fit --max-batched-tokens {config.max_batched_tokens}"
        raise ConfigError("--max-num-seqs", problem)
    if not 0 <= config.micro_batches <= MOST:
        raise ConfigError("--micro-batches", f"{config.micro_batches}: give 1 or 2, or 0 for what measures faster")
    longest = context_length(config, spec)
    blocks = parse_bytes("--kv-memory", config.kv_memory) // bytes_per_block
    _check_kv(config, longest, blocks, bytes_per_block)
    useful = config.max_num_seqs * blocks_for(longest, config.block_size)
    return Limits(
        max_model_len=longest,
        max_num_seqs=config.max_num_seqs,
        max_batched_tokens=config.max_batched_tokens,
        max_waiting=config.max_waiting,
        vocab_size=spec.vocab_size,
        kv_blocks=min(blocks, useful),
        block_size=config.block_size,
        mixed_prefill=config.mixed_prefill,
    )


def _check_kv(config: AttentionConfig, longest: int, blocks: int, bytes_per_block: int) -> None:
    needed = blocks_for(longest, config.block_size)
    if blocks < needed:
        mebibytes = -(-needed * bytes_per_block // 2**20)
        raise ConfigError(
            "--kv-memory",
            f"{config.kv_memory} holds {blocks * config.block_size} tokens, one sequence may have {longest}; "
            f"give {mebibytes}MiB or more, or a smaller --max-model-len",
        )
