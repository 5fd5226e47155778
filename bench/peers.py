"""How fast does a mesh decode, beside vLLM and llama.cpp on the same cores?

    python bench/peers.py --model DIR [--vllm PYTHON] [--llama-server BINARY --gguf FILE] [--batch 1,8,32] --json

All serve the same prompts over HTTP in interleaved repeats of one run; a server that is not being measured is halted.
vLLM takes its fastest dtype, tried first for each batch size. Ratios of tokens/s are medians over repeats. What is not
given is not measured; docs/evaluation.md says how to get it.
"""

import argparse
import asyncio
import os
import shutil
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from common import Bar, Sample, median, medians, prompts, refuse_paced, report, run_mesh
from peer_servers import Server, llama, vllm

from shared.cli.mesh import LocalMesh, MeshOptions
from shared.cli.owned import owned_directory

LEAST = {"vLLM": {1: 1.6, 8: 1.7, 32: 2.0}, "llama.cpp": {1: 0.85, 8: 0.95, 32: 1.5}}
"""Project -> batch -> lowest acceptable ratio of tokens/s."""
PROBE_TOKENS = 6


def wanted(args: argparse.Namespace, scratch: Path) -> list[Server]:
    """The servers that were given; says which ones were not."""
    most, servers = max(args.batch), []
    if args.vllm and shutil.which(args.vllm):
        servers += [vllm(args.vllm, args.model, dtype, most, scratch) for dtype in args.vllm_dtype.split(",")]
    else:
        print("vLLM is not measured: needs --vllm, a python that has it", flush=True)
    if args.llama_server and shutil.which(args.llama_server) and Path(args.gguf).is_file():
        servers.append(llama(args.llama_server, args.gguf, args.threads, most, scratch))
    else:
        print("llama.cpp is not measured: needs --llama-server, its server, and --gguf, the model for it", flush=True)
    return servers


async def ask(server: Server, ids: list[list[int]], output: int) -> Sample:
    with server.awake():
        return await run_mesh(server.url, ids, output, server.ask)


async def fastest(servers: list[Server], ids: list[list[int]], output: int) -> list[Server]:
    """The server of each project that would finish ``output`` tokens first, by a short trial."""
    trials: dict[str, dict[float, Server]] = {}
    for server in servers:
        await ask(server, ids, PROBE_TOKENS)
        sample = await ask(server, ids, PROBE_TOKENS)
        trials.setdefault(server.project, {})[sample.ttft + (output - 1) * sample.tpot] = server
    return [tried[min(tried)] for tried in trials.values()]


async def compare(
    url: str, servers: list[Server], batch: int, args: argparse.Namespace
) -> tuple[dict[str, Any], list[Bar]]:
    """Interleaved repeats for one batch size."""
    ids = prompts(batch, args.prompt, args.vocab, seed=batch)
    chosen = await fastest(servers, ids, args.output)
    await run_mesh(url, ids, PROBE_TOKENS)
    ours: list[Sample] = []
    theirs: dict[str, list[Sample]] = {server.project: [] for server in chosen}
    for _ in range(args.repeats):
        ours.append(await run_mesh(url, ids, args.output))
        for server in chosen:
            theirs[server.project].append(await ask(server, ids, args.output))
    row: dict[str, Any] = {"batch": batch, "mesh": medians(ours)}
    bars = []
    for server in chosen:
        name, samples = server.project, theirs[server.project]
        ratio = median([a.rate / b.rate for a, b in zip(ours, samples, strict=True)])
        row[name] = {**medians(samples), "variant": server.variant, "ratio": round(ratio, 3)}
        if batch in LEAST[name]:
            bars.append(Bar(f"mesh / {name}, tokens/s, batch {batch}", ratio, LEAST[name][batch]))
    print(row, flush=True)
    return row, bars


async def measure(args: argparse.Namespace, stack: ExitStack) -> tuple[dict[str, Any], list[Bar]]:
    """Every batch size on one mesh, beside servers that ``stack`` ends."""
    scratch = stack.enter_context(owned_directory("moemesh-peers-"))
    servers = wanted(args, scratch)
    for server in servers:
        stack.callback(server.stop)
        await server.start()
    settings = {"prefix_cache": "false"}  # every repeat serves the same prompts
    options = MeshOptions(model=args.model, attention=1, experts=2, port=0, mesh="bench", settings=settings)
    rows, bars = [], []
    if servers:
        async with LocalMesh(options) as mesh:
            await refuse_paced(mesh)
            for batch in args.batch:
                row, more = await compare(mesh.url, servers, batch, args)
                rows.append(row)
                bars += more
    return {"model": args.model, "mesh": "1A2E", "rows": rows}, bars


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--model", required=True, help="checkpoint directory (moemesh models make --preset bench-1b)")
    p.add_argument("--vllm", default="", metavar="PYTHON", help="interpreter of an environment that has vLLM")
    p.add_argument("--vllm-dtype", default="bfloat16,float32", help="dtypes that vLLM may choose from")
    p.add_argument("--llama-server", default="", metavar="BINARY", help="llama.cpp's server")
    p.add_argument("--gguf", default="", metavar="FILE", help="the checkpoint in llama.cpp's format, bf16")
    p.add_argument("--batch", type=lambda s: [int(b) for b in s.split(",")], default=[1, 8, 32])
    p.add_argument("--prompt", type=int, default=64, help="prompt tokens")
    p.add_argument("--output", type=int, default=64, help="output tokens")
    p.add_argument("--repeats", type=int, default=5)
    p.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)), help="threads of llama.cpp")
    p.add_argument("--vocab", type=int, default=4096, help="prompts use ids below this")
    p.add_argument("--json", action="store_true", help="accepted for symmetry: the last line is always JSON")
    with ExitStack() as stack:
        result, bars = asyncio.run(measure(p.parse_args(), stack))
    report("peers", result, bars)


if __name__ == "__main__":
    main()
