"""The checkpoint through transformers, timed: every way to run it, and which of them is fastest for a batch.

Covers dtypes and experts implementations. Not here: the mesh's side, which common.py has.
"""

import time
from dataclasses import dataclass
from typing import Any

import torch
from common import Sample
from transformers import AutoModelForCausalLM
from transformers.generation.streamers import BaseStreamer
from transformers.utils import logging as transformers_logging

PROBE_TOKENS = 6
GATHERED_MAX = 4 << 30
"""Bytes of weights that batched_mm may copy in a prefill, which gathers one expert's weights for every part."""


@dataclass(frozen=True)
class Peer:
    """One way to run the checkpoint in transformers; peers of one dtype share a model."""

    dtype: str
    experts: str
    model: Any

    def generate(self, x: torch.Tensor, output: int) -> Sample:
        """``output`` greedy tokens after the prompts x [batch, length]."""
        self.model.set_experts_implementation(self.experts)
        settings = {"max_new_tokens": output, "min_new_tokens": output, "do_sample": False}
        stamps = Stamps()
        start = time.perf_counter()
        with torch.inference_mode():
            y = self.model.generate(x, attention_mask=torch.ones_like(x), streamer=stamps, **settings)
        spent = time.perf_counter() - start
        assert y.shape[1] == x.shape[1] + output
        first, last = stamps.times[0] - start, stamps.times[-1] - start
        return Sample(first, (last - first) / max(1, output - 1), len(x) * output / spent)


class Stamps(BaseStreamer):
    """When each token of a batch came."""

    def __init__(self) -> None:
        self.times: list[float] = []
        self._prompt_seen = False

    def put(self, value: torch.Tensor) -> None:
        if self._prompt_seen:
            self.times.append(time.perf_counter())
        self._prompt_seen = True

    def end(self) -> None:
        pass


def load_peers(model: str, threads: int) -> list[Peer]:
    """The checkpoint in each dtype, with each experts implementation of transformers, on that many threads."""
    torch.set_num_threads(threads)
    transformers_logging.disable_progress_bar()
    peers = []
    for dtype in ("float32", "bfloat16"):
        loaded = AutoModelForCausalLM.from_pretrained(model, dtype=getattr(torch, dtype)).eval()
        peers += [Peer(dtype, experts, loaded) for experts in ("eager", "grouped_mm", "batched_mm")]
    return peers


def fastest(peers: list[Peer], ids: list[list[int]], output: int) -> Peer:
    """The peer that would finish ``output`` tokens first, by a short trial; what it cannot run does not count."""
    trials: dict[float, Peer] = {}
    for peer in peers:
        if peer.experts == "batched_mm" and gathered_bytes(peer.model, sum(map(len, ids))) > GATHERED_MAX:
            continue
        try:
            peer.generate(torch.tensor(ids), PROBE_TOKENS)  # the first of a dtype pays for what is done once
            sample = peer.generate(torch.tensor(ids), PROBE_TOKENS)
        except (RuntimeError, NotImplementedError) as error:
            print(f"transformers {peer.dtype} {peer.experts}: {str(error)[:80]}")
            continue
        trials[sample.ttft + (output - 1) * sample.tpot] = peer
    return trials[min(trials)]


def gathered_bytes(model: Any, rows: int) -> int:
    """Bytes that batched_mm gathers for ``rows`` rows of one layer."""
    config = model.config
    weights = 3 * config.hidden_size * config.moe_intermediate_size * model.dtype.itemsize
    return rows * config.num_experts_per_tok * weights
