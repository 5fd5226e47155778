"""Who goes first when threads queue for a core: compute before control."""

import os
from contextlib import suppress

CONTROL_NICENESS = 10
"""Of what speaks HTTP and NATS: it must not take a core from compute threads in the middle of a layer."""


def yield_to_others(number: int, niceness: int = CONTROL_NICENESS) -> None:
    """Lower the priority of a process or thread of ours by ``niceness``; one that has ended is ignored."""
    with suppress(ProcessLookupError):
        os.setpriority(os.PRIO_PROCESS, number, min(19, os.getpriority(os.PRIO_PROCESS, 0) + niceness))
