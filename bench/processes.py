"""What the processes of a mesh cost, as Linux counts it: CPU time and memory.

Covers every service and NATS, which counts as one of them. The clients, and so the bench itself, do not count.
"""

import os
import re
from pathlib import Path

from shared.cli.mesh import LocalMesh


def services(mesh: LocalMesh) -> dict[str, int]:
    """Name of every service process of a running mesh, NATS among them -> its process id."""
    pids = {name: child.process.pid for name, child in mesh.children.items() if child.process}
    return pids | ({"nats": mesh.nats.process.pid} if mesh.nats and mesh.nats.process else {})


def cpu_seconds(pid: int) -> float:
    """CPU time that all threads of a process have used so far, those that have ended included."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    user, system = fields[11:13]  # utime and stime, the 14th and 15th fields of proc_pid_stat(5)
    return (int(user) + int(system)) / os.sysconf("SC_CLK_TCK")


def pss_bytes(pid: int) -> int:
    """Proportional set size: a page that n processes share counts 1/n for each of them."""
    text = Path(f"/proc/{pid}/smaps_rollup").read_text()
    found = re.search(r"^Pss:\s+(\d+) kB$", text, re.M)
    if not found:
        raise RuntimeError(f"no Pss in /proc/{pid}/smaps_rollup")
    return int(found[1]) * 1024
