"""``moemesh up`` and ``moemesh demo``: a whole mesh on this machine, in the foreground."""

import asyncio
import signal
from collections.abc import Mapping
from typing import Annotated

import typer
from rich.console import Console

from shared.cli.client import plain_console, stream_completion
from shared.cli.mesh import LocalMesh, MeshOptions
from shared.messages import Heartbeat

DEMO_PROMPT = "In the beginning God created the heaven and the earth."


def up(
    model: Annotated[str, typer.Option(envvar="MOEMESH_MODEL", help="directory or hub id; empty: the demo model")] = "",
    attention: Annotated[int, typer.Option(min=1, help="attention instances")] = 1,
    experts: Annotated[int | None, typer.Option(min=1, help="expert instances [default: 2]")] = None,
    monolith: Annotated[
        bool, typer.Option(envvar="MOEMESH_MONOLITH", help="no expert instances: attention holds every expert itself")
    ] = False,
    host: Annotated[str, typer.Option(help="address of the gateway")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="port of the gateway; 0: any free port")] = 8000,
    nats: Annotated[str, typer.Option(envvar="MOEMESH_NATS", help="URL of a running NATS server; else start one")] = "",
    mesh: Annotated[str, typer.Option(envvar="MOEMESH_MESH", help="name of the mesh")] = "default",
    served_model_name: Annotated[str, typer.Option(help="model name in the API")] = "",
    max_model_len: Annotated[int, typer.Option(min=0, help="longest sequence in tokens; 0: the model's")] = 0,
    dtype: Annotated[str, typer.Option(help="auto, float32 or bfloat16")] = "",
    max_num_seqs: Annotated[int, typer.Option(min=0, help="most sequences in one step; 0: default")] = 0,
    kv_memory: Annotated[str, typer.Option(help="memory of each KV cache, e.g. 512MiB")] = "",
    api_key: Annotated[str, typer.Option(help="bearer token that /v1 requires")] = "",
    pace: Annotated[str, typer.Option(help="device profile, by name or file, whose times all instances keep")] = "",
    autoscale: Annotated[
        str, typer.Option(envvar="MOEMESH_AUTOSCALE", help="size the pools by demand: off, observe or on")
    ] = "",
    slo_tpot_ms: Annotated[float, typer.Option(min=0, help="milliseconds that a token may take, for --autoscale")] = 0,
    profile: Annotated[str, typer.Option(help="file of `moemesh profile`, for --autoscale")] = "",
    verbose: Annotated[bool, typer.Option(help="show every service's log")] = False,
) -> None:
    """Start a whole mesh here; prints "ready URL" when it serves. Ctrl-C drains and stops it."""
    if monolith and experts:
        raise typer.BadParameter("a monolith has no expert instances", param_hint="--experts")
    if monolith and autoscale not in ("", "off"):
        raise typer.BadParameter("a monolith has no scheduler that could size it", param_hint="--autoscale")
    if (slo_tpot_ms or profile) and autoscale in ("", "off"):
        raise typer.BadParameter("nothing is sized by --slo-tpot-ms or --profile without it", param_hint="--autoscale")
    given = {
        "served_model_name": served_model_name,
        "max_model_len": max_model_len or "",
        "dtype": dtype,
        "max_num_seqs": max_num_seqs or "",
        "kv_memory": kv_memory,
        "api_key": api_key,
        "pace": pace,
        "autoscale": autoscale,
        "slo_tpot_ms": slo_tpot_ms or "",
        "profile": profile,
    }
    settings = {k: str(v) for k, v in given.items() if v}
    instances = 0 if monolith else experts or MeshOptions.experts
    options = MeshOptions(model, attention, instances, host, port, nats, mesh, settings)
    asyncio.run(run_up(options, Progress(Console(stderr=True, highlight=False), verbose)))


def demo(
    prompt: Annotated[str, typer.Argument(help="what to continue")] = DEMO_PROMPT,
    max_tokens: Annotated[int, typer.Option(min=1)] = 80,
) -> None:
    """Start a small mesh on the embedded model, stream one completion, stop."""
    progress = Progress(Console(stderr=True, highlight=False), verbose=False)
    asyncio.run(run_demo({"prompt": prompt, "max_tokens": max_tokens, "temperature": 0.7, "seed": 7}, progress))


class Progress:
    """What a person sees while the mesh starts and runs; everything goes to stderr."""

    def __init__(self, console: Console, verbose: bool) -> None:
        self.console = console
        self.verbose = verbose
        self._seen: dict[str, str] = {}

    def line(self, name: str, line: str) -> None:
        """A log line of a service: shown when verbose, or when it is more than information."""
        if self.verbose or any(word in line for word in ("WARNING", "ERROR", "ended with", "killed")):
            self.console.print(f"[dim]{name:>12}[/dim] ", end="")
            self.console.print(line, markup=False, soft_wrap=True)

    def heartbeat(self, beat: Heartbeat) -> None:
        """A change of an instance's state or loading detail."""
        text = f"{beat.state.value} {beat.detail}".strip()
        if self._seen.get(beat.id) != text:
            self._seen[beat.id] = text
            self.console.print(f"[dim]{beat.id:>12}[/dim] {text}", soft_wrap=True)


async def run_up(options: MeshOptions, progress: Progress) -> None:
    """Run a mesh until SIGINT or SIGTERM. Raises ChildDied when a service ends while loading."""
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, stop.set)
    mesh = LocalMesh(options, progress.line, progress.heartbeat)
    starting = asyncio.create_task(mesh.__aenter__())
    stopped = asyncio.create_task(stop.wait())
    try:
        await asyncio.wait({starting, stopped}, return_when=asyncio.FIRST_COMPLETED)
        if starting.done():
            print(f"ready {starting.result().url}", flush=True)
            await stopped
    finally:
        progress.console.print("[dim]stopping[/dim]")
        starting.cancel()
        await asyncio.wait({starting})
        await mesh.stop()


async def run_demo(body: Mapping[str, object], progress: Progress) -> None:
    """Stream one completion from a 1A2E mesh on free ports."""
    async with LocalMesh(MeshOptions(port=0, mesh="demo"), progress.line, progress.heartbeat) as mesh:
        out = plain_console()
        out.print(str(body["prompt"]), end="", style="bold", soft_wrap=True)
        await asyncio.to_thread(print_completion, mesh.url, dict(body), out)


def print_completion(url: str, body: dict[str, object], out: Console) -> None:
    """Print the pieces of a streamed completion as they come."""
    for piece in stream_completion(url, body):
        out.print(piece, end="", soft_wrap=True)
    out.print()
