"""Other projects' servers as child processes: vLLM and llama.cpp, started once, halted while others are measured.

Covers how they are started, asked and ended. Not here: how they are installed (docs/evaluation.md).
"""

import asyncio
import json
import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
from common import Ask, Stream, lines_of, stream_tokens

READY_LIMIT_S = 900.0
HALTED_LIMIT_S = 3600.0
STOP_LIMIT_S = 30.0
LAST_LINES = 15
CONTEXT = 512
"""Tokens of a sequence that servers make room for."""


@dataclass
class Server:
    """One server process and its children, a process group of its own."""

    project: str
    variant: str
    port: int
    command: list[str]
    log_file: Path
    ask: Ask
    environ: Mapping[str, str] = field(default_factory=dict)
    """Variables beside ours."""
    process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    async def start(self) -> None:
        """Returns when it is ready, halted. Raises RuntimeError with its last lines when it ends or takes too long."""
        self.process = self._spawn()
        limit = time.monotonic() + READY_LIMIT_S
        async with httpx.AsyncClient(timeout=5.0) as client:
            while not await self._is_ready(client):
                if self.process.poll() is not None or time.monotonic() > limit:
                    raise RuntimeError(f"{self.project} {self.variant} did not start:\n{self._last_lines()}")
                await asyncio.sleep(0.2)
        self._signal(signal.SIGSTOP)

    def _spawn(self) -> subprocess.Popen[bytes]:
        setpriv = shutil.which("setpriv")  # util-linux; without it a server may outlive a bench that was killed
        follow_parent = [setpriv, "--pdeathsig", "TERM"] if setpriv else []
        with self.log_file.open("wb") as log:
            return subprocess.Popen(
                [*follow_parent, *self.command],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env={**os.environ, **self.environ},
                # Of our session: when we end, the system wakes and hangs up groups of it that are left halted.
                process_group=0,
            )

    async def _is_ready(self, client: httpx.AsyncClient) -> bool:
        try:
            return (await client.get(self.url + "/health")).status_code == 200
        except httpx.HTTPError:
            return False

    @contextmanager
    def awake(self) -> Iterator[None]:
        """Runs inside, halted outside: a server that polls would take the cores from the one that is measured."""
        self._signal(signal.SIGCONT)
        try:
            yield
        finally:
            self._signal(signal.SIGSTOP)

    def stop(self) -> None:
        """SIGTERM, then SIGKILL for what is left of the group; no-op when it has not been started."""
        if self.process is None:
            return
        self._signal(signal.SIGTERM)
        self._signal(signal.SIGCONT)
        with suppress(subprocess.TimeoutExpired):
            self.process.wait(STOP_LIMIT_S)
        self._signal(signal.SIGKILL)
        self.process.wait(STOP_LIMIT_S)

    def _signal(self, number: signal.Signals) -> None:
        if self.process is not None:
            with suppress(ProcessLookupError):
                os.killpg(self.process.pid, number)

    def _last_lines(self) -> str:
        return "\n".join(self.log_file.read_text(errors="replace").splitlines()[-LAST_LINES:])


def vllm(python: str, model: str, dtype: str, most: int, scratch: Path) -> Server:
    """vLLM's OpenAI server, computing on every core of ours; ``most``: sequences at once."""
    port = free_port()
    environ = {
        "VLLM_CPU_KVCACHE_SPACE": "1",  # GiB
        "VLLM_CPU_OMP_THREADS_BIND": ",".join(map(str, sorted(os.sched_getaffinity(0)))),
        "VLLM_ENGINE_READY_TIMEOUT_S": f"{READY_LIMIT_S:.0f}",
        "VLLM_EXECUTE_MODEL_TIMEOUT_SECONDS": f"{HALTED_LIMIT_S:.0f}",  # a step may be under way when it is halted
        "VLLM_NO_USAGE_STATS": "1",
        "HF_HUB_OFFLINE": "1",
        "PYTHONPATH": "",
    }
    settings = ["--dtype", dtype, "--max-model-len", str(CONTEXT), "--max-num-seqs", str(most)]
    settings += ["--host", "127.0.0.1", "--port", str(port), "--no-enable-prefix-caching"]
    command = [python, "-m", "vllm.entrypoints.openai.api_server", "--model", model, *settings]
    return Server("vLLM", dtype, port, command, scratch / f"vllm-{dtype}.log", stream_tokens, environ)


def llama(binary: str, gguf: str, threads: int, most: int, scratch: Path) -> Server:
    """llama.cpp's server; ``most``: sequences at once, its slots."""
    port = free_port()
    settings = ["--threads", str(threads), "--parallel", str(most), "--ctx-size", str(most * CONTEXT)]
    settings += ["--host", "127.0.0.1", "--port", str(port), "--no-webui", "--cache-ram", "0"]
    command = [binary, "--model", gguf, *settings]
    return Server("llama.cpp", Path(gguf).name, port, command, scratch / "llama.log", stream_llama)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


async def stream_llama(client: httpx.AsyncClient, url: str, prompt: list[int], max_tokens: int) -> Stream:
    """One greedy completion in llama-server's own API, which alone counts tokens that are not yet text."""
    request = {"prompt": prompt, "n_predict": max_tokens, "temperature": 0, "ignore_eos": True, "cache_prompt": False}
    stream = Stream(time.perf_counter())
    async with client.stream("POST", url + "/completion", json={**request, "stream": True}) as response:
        if response.status_code != 200:
            raise RuntimeError((await response.aread()).decode())
        async for line in lines_of(response):
            if line.startswith("data: {"):
                take_llama_event(stream, json.loads(line[6:]))
    return stream


def take_llama_event(stream: Stream, event: dict[str, Any]) -> None:
    """Tokens come in a later event when they end amid a character. Raises RuntimeError for an error event."""
    if "error" in event:
        raise RuntimeError(event["error"]["message"])
    stream.arrivals += [time.perf_counter()] * (event["tokens_predicted"] - len(stream.arrivals))
