"""Who goes first when threads queue for a core: compute before control."""

import os
from contextlib import suppress
from pathlib import Path

CONTROL_NICENESS = 10
"""Of what speaks HTTP and NATS: it must not take a core from compute threads in the middle of a layer."""


def let_senders_finish() -> None:
    """A frame that wakes this thread does not take the core from its sender, which may have more to send.

    The sender goes on until it waits itself. Threads that are started from now on inherit it (Linux: SCHED_BATCH).
    """
    with suppress(AttributeError, OSError):  # a system or sandbox without it: only slower
        os.sched_setscheduler(0, os.SCHED_BATCH, os.sched_param(0))


def yield_to_others(number: int, niceness: int = CONTROL_NICENESS) -> None:
    """Lower the priority of a process or thread of ours by ``niceness``; one that has ended is ignored."""
    with suppress(ProcessLookupError):
        os.setpriority(os.PRIO_PROCESS, number, min(19, os.getpriority(os.PRIO_PROCESS, 0) + niceness))


def halting_costs() -> bool:
    """Whether keeping cores awake pays here: in a virtual machine, where no quota counts the time that it takes."""
    with suppress(OSError):
        return " hypervisor" in Path("/proc/cpuinfo").read_text() and not has_quota(Path("/sys/fs/cgroup"))
    return False


def has_quota(cgroup: Path) -> bool:
    """Whether the processes of a container may use only so much time of their cores (cgroups 2 and 1)."""
    for file, unlimited in ((cgroup / "cpu.max", "max"), (cgroup / "cpu/cpu.cfs_quota_us", "-1")):
        if file.exists():
            return file.read_text().split()[0] != unlimited
    return False
