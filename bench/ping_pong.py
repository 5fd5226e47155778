"""What do micro-batches and the overlap of shared experts bring, where devices and links keep each other waiting?

    python bench/ping_pong.py [--repeats 5] --json

Paced meshes 1A2E (docs/operations.md): a small checkpoint of random weights computes for real, and every layer takes
the time of a synthetic profile, in which attention and experts need about as long as each other. Tokens/s with two
micro-batches against one, in interleaved repeats; bytes on the link; and how much of the shared experts' time shows in
the time per output token when they take some against when they take none.
"""

import argparse
import asyncio
import json
import re
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import httpx
from common import Bar, Sample, Stream, median, medians, prompts, report, run_mesh, stream_tokens

from shared.cli.mesh import LocalMesh, MeshOptions
from shared.cli.owned import owned_directory
from shared.cli.status import look
from shared.messages import Kind
from shared.models.presets import make_checkpoint

LAYERS, EXPERTS, VOCAB = 4, 32, 320
MODEL = {
    "architectures": ["Qwen2MoeForCausalLM"],
    "model_type": "qwen2_moe",
    "num_hidden_layers": LAYERS,
    "num_experts": EXPERTS,
    "num_experts_per_tok": 4,
    "shared_expert_intermediate_size": 32,
}
SHARED_ROW_S = 1.0e-3
PROFILE = {
    "name": "synthetic-even",
    "about": "synthetic: attention and experts take about equally long at 8 rows",
    "attention_row_s": 3.0e-3,
    "expert_s": 2.0e-3,
    "link_latency_s": 2.0e-3,
}
FASTER, HIDDEN = 1.5, 0.8


def options(model: Path, profile: dict[str, Any], micro_batches: int) -> MeshOptions:
    """One paced mesh; its profile is written beside the checkpoint."""
    file = model.parent / f"{micro_batches}-{profile.get('shared_row_s', 0)}.json"
    file.write_text(json.dumps(profile))
    settings = {"pace": str(file), "micro_batches": str(micro_batches), "prefix_cache": "false"}
    return MeshOptions(str(model), 1, 2, port=0, mesh=f"bench-{file.stem.replace('.', '-')}", settings=settings)


async def exchanged(mesh: LocalMesh) -> dict[str, float]:
    """Bytes that the attention instance has sent and received, by direction."""
    members, _ = await look(mesh.nats_url, mesh.options.mesh)
    url = next(m.heartbeat.url for m in members if m.heartbeat.kind is Kind.ATTENTION)
    async with httpx.AsyncClient() as client:
        text = (await client.get(url + "/metrics")).text
    found = re.findall(r'^moemesh_exchange_bytes\S*direction="(\w+)"\S* (\S+)$', text, re.M)
    return {direction: float(value) for direction, value in found}


async def ask(client: httpx.AsyncClient, url: str, prompt: list[int], output: int) -> Stream:
    """A sampled completion, the same from every mesh: greedy ones of random weights soon agree in their tokens, and
    then a whole batch asks the same few experts."""
    return await stream_tokens(client, url, prompt, output, temperature=1.0, seed=sum(prompt))


async def alternate(meshes: dict[str, LocalMesh], ids: list[list[int]], args: argparse.Namespace) -> dict[str, list]:
    """Samples of every mesh, in turns."""
    samples: dict[str, list[Sample]] = {name: [] for name in meshes}
    for mesh in meshes.values():
        await run_mesh(mesh.url, ids, 4, ask)
    for number in range(args.repeats):
        for name in list(meshes)[:: 1 if number % 2 == 0 else -1]:
            samples[name].append(await run_mesh(meshes[name].url, ids, args.output, ask))
    return samples


async def measure(args: argparse.Namespace, scratch: Path) -> tuple[dict[str, Any], list[Bar]]:
    """Both questions, one after the other."""
    model = scratch / "model"
    make_checkpoint("tiny-qwen3", model, **MODEL)
    shared = {**PROFILE, "shared_row_s": SHARED_ROW_S}
    ids = prompts(args.batch, args.prompt, VOCAB, seed=1)
    async with AsyncExitStack() as stack:
        settings = {
            "one": options(model, PROFILE, 1),
            "two": options(model, PROFILE, 2),
            "shared": options(model, shared, 1),
        }
        meshes = {name: await stack.enter_async_context(LocalMesh(given)) for name, given in settings.items()}
        samples = await alternate(meshes, ids, args)
        sent = {name: await exchanged(meshes[name]) for name in ("one", "two")}
    faster = median([b.rate / a.rate for a, b in zip(samples["one"], samples["two"], strict=True)])
    shown = [b.tpot - a.tpot for a, b in zip(samples["one"], samples["shared"], strict=True)]
    hidden = 1 - median(shown) / (LAYERS * SHARED_ROW_S * args.batch)
    result = {"paced": PROFILE["name"], **{name: medians(taken) for name, taken in samples.items()}, "bytes": sent}
    most = max(abs(sent["two"][d] / sent["one"][d] - 1) for d in sent["one"])
    return result, [
        Bar("paced: two micro-batches / one, tokens/s", faster, FASTER),
        Bar("paced: share of the shared experts' time that is hidden", hidden, HIDDEN),
        Bar("paced: bytes of two micro-batches beside one, difference", most, 0.0, True),
    ]


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--model", help="accepted for symmetry: the bench makes its own")
    p.add_argument("--batch", type=int, default=8)
    p.add_argument("--prompt", type=int, default=16, help="prompt tokens")
    p.add_argument("--output", type=int, default=64, help="output tokens")
    p.add_argument("--repeats", type=int, default=5)
    p.add_argument("--json", action="store_true", help="accepted for symmetry: the last line is always JSON")
    args = p.parse_args()
    with owned_directory("moemesh-bench-") as scratch:
        result, bars = asyncio.run(measure(args, scratch))
    report("ping_pong", result, bars)


if __name__ == "__main__":
    main()
