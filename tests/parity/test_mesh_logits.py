"""Raw logits through real expert processes over UCX (1A2E, fp32) against transformers on the same checkpoint.

The attention side is the service's own decoder, exchange and step, in this process, beside the mesh's own attention
instance; the two expert processes, the placement and the addresses are the running mesh's.
"""

import secrets
from contextlib import closing
from typing import Any

import numpy as np
import torch
from torch import Tensor

from services.attention.batching import Chunk
from services.attention.exchange import ExpertInstance, View
from services.attention.kv_cache import BlockPool
from services.attention.mesh_exchange import MeshExchange
from services.attention.sequence import Sequence
from services.attention.step import ModelRunner
from shared.activation import mesh_hash
from shared.cli.status import look
from shared.exchange_frames import longest_frame
from shared.kernels.base import select_kernels
from shared.models.decoder import Decoder
from shared.models.loader import Checkpoint, open_checkpoint
from shared.request_messages import SamplingParams, Submit
from shared.transport.ucx import UcxTransport
from tests.mesh import RunningMesh

CPU = torch.device("cpu")
LENGTHS = (2, 17, 64, 150, 230)
ROWS = sum(LENGTHS)
BLOCK = 16
BLOCKS = 64
TOLERANCE = 1e-4


def view_of(mesh: RunningMesh) -> View:
    """The experts of a running mesh, as its own attention instance sees them."""
    members, record = mesh.call(look(mesh.mesh.nats_url, mesh.mesh.options.mesh))
    beats = [(m.heartbeat, m.last_seen) for m in members]
    instances = [ExpertInstance(b.id, b.incarnation, b.experts.address, seen) for b, seen in beats if b.experts]
    return View(record.committed if record else None, {instance.id: instance for instance in instances})


def sequences(prompts: list[list[int]]) -> list[Sequence]:
    """One per prompt, with the blocks for all its tokens."""
    pool = BlockPool(BLOCKS, BLOCK)
    made = []
    for prompt in prompts:
        submit = Submit(
            request_id=secrets.token_hex(4), gateway="g", prompt=np.array(prompt, "<i4").tobytes(),
            sampling=SamplingParams(max_tokens=1), deadline_s=600,
        )  # fmt: skip
        made.append(Sequence.from_submit(submit, pool, 0.0))
        assert made[-1].table.grow_to(len(prompt))
    return made


def all_logits(runner: ModelRunner, chunks: list[Chunk]) -> list[Tensor]:
    """One step through the mesh: logits [count, vocab] of every row, by chunk."""
    done = runner.forward(chunks)
    rows = np.arange(sum(chunk.count for chunk in chunks), dtype=np.int64)
    logits = torch.cat([torch.from_numpy(part.copy()) for _, part in runner.logits_of(done, rows)])
    return list(logits.split([chunk.count for chunk in chunks]))


def mesh_logits(mesh: RunningMesh, checkpoint: Checkpoint, prompts: list[list[int]]) -> list[Tensor]:
    """Logits of every position: all but the last token of all prompts in one step, the last ones in a decode step."""
    spec = checkpoint.spec
    kernels = select_kernels(CPU, 1)
    decoder = Decoder(checkpoint, kernels, CPU, torch.float32, max(LENGTHS))
    with closing(UcxTransport(longest_frame(ROWS, spec.router.top_k, spec.hidden))) as transport:
        exchange = MeshExchange(
            transport, kernels, hidden=spec.hidden, dtype=torch.float32, top_k=spec.router.top_k,
            mesh=mesh_hash(mesh.mesh.options.mesh, checkpoint.digest), incarnation=secrets.randbits(64), deadline=10.0,
        )  # fmt: skip
        exchange.update(view_of(mesh))
        runner = ModelRunner(decoder, decoder.new_cache(BLOCKS, BLOCK), exchange, BLOCK)
        made = sequences(prompts)
        with torch.inference_mode():
            prefill = all_logits(runner, [Chunk(s, 0, s.length - 1) for s in made])
            decode = all_logits(runner, [Chunk(s, s.length - 1, 1) for s in made])
        stats = exchange.stats()
        assert stats.exchanges == 2 * len(spec.moe_layers)
        assert not stats.repeats and not stats.dropped
    return [torch.cat(both) for both in zip(prefill, decode, strict=True)]


def test_logits_of_prompts_in_one_batch_are_those_of_transformers(served: tuple[RunningMesh, Any]) -> None:
    mesh, reference = served
    checkpoint = open_checkpoint(mesh.mesh.options.model)
    generator = torch.Generator().manual_seed(11)
    prompts = [torch.randint(3, checkpoint.spec.vocab_size, (n,), generator=generator).tolist() for n in LENGTHS]
    found = mesh_logits(mesh, checkpoint, prompts)
    for prompt, ours in zip(prompts, found, strict=True):
        with torch.inference_mode():
            theirs = reference(torch.tensor([prompt])).logits[0].float()
        worst = float((ours - theirs).abs().max())
        print(f"{checkpoint.source.name}, prompt of {len(prompt)}: max abs difference of logits {worst:.2e}")
        assert ours.shape == theirs.shape
        assert worst <= TOLERANCE
