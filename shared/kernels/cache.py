"""Where compiled kernels are kept on disk, and how processes that start together compile them only once."""

import fcntl
import hashlib
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path

PATIENCE_S = 120.0
"""How long a process waits for another one that compiles, before it compiles for itself."""

KEPT_S = 30 * 24 * 3600.0
"""What no process has used for so long is removed when another version's kernels are compiled."""


def cache_directory(environ: Mapping[str, str]) -> Path:
    """One directory per version of these sources: under ``XDG_CACHE_HOME`` or ``~/.cache``, else the temporary one.

    Numba itself would notice a change only in the file of the outermost kernel. Never beside the sources, which may be
    read-only; never one that another user could have filled.
    """
    here = Path(__file__).parent
    folders = (here, *(here.parent / name for name in ("elastic", "replay", "scheduling", "transport")))
    compiled = (
        *(folder.glob("*.py") for folder in folders),
        [here.parent / "activation.py", here.parent / "express.py"],
    )
    sources = [source for sources in compiled for source in sorted(sources)]
    digest = hashlib.sha256(b"\0".join(source.read_bytes() for source in sources)).hexdigest()
    home = environ.get("XDG_CACHE_HOME") or (environ.get("HOME", "") and environ["HOME"] + "/.cache")
    temporary = Path(tempfile.gettempdir()) / f"moemesh-{os.getuid()}"
    wanted = Path(home) / "moemesh" if home else temporary
    return (wanted if _usable(wanted) else temporary) / f"kernels-{digest[:16]}"


def _usable(directory: Path) -> bool:
    """Whether files can be written there, by us and nobody else."""
    try:
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError:
        return False
    return directory.stat().st_uid == os.getuid() and os.access(directory, os.W_OK)


def compile_once(directory: Path | None, work: Callable[[], None], patience: float = PATIENCE_S) -> None:
    """Do ``work``, which compiles into ``directory``; while nobody has finished that, one process at a time.

    The others find everything compiled when their turn comes. Only speed depends on it: numba replaces its files whole.
    """
    if directory is None or not _usable(directory):
        work()
        return
    complete = directory / "complete"
    if complete.exists():
        complete.touch()  # says that it is in use
        work()
        return
    with (directory / "lock").open("a") as lock:
        _acquire(lock.fileno(), patience)  # released when the file is closed
        work()
        complete.touch()
        _remove_old(directory, time.time() - KEPT_S)


def _remove_old(ours: Path, before: float) -> None:
    """Remove the caches of other versions beside ``ours`` that were last used before that time (since the epoch)."""
    for other in ours.parent.glob("kernels-*"):
        if other != ours and _last_used(other) < before:
            shutil.rmtree(other, ignore_errors=True)


def _last_used(directory: Path) -> float:
    """Time since the epoch; now for what another process has just removed."""
    try:
        return max(path.stat().st_mtime for path in (directory, *directory.glob("complete")))
    except FileNotFoundError:
        return time.time()


def _acquire(descriptor: int, patience: float) -> bool:
    """Lock the file, or give up after ``patience`` seconds."""
    deadline = time.monotonic() + patience
    while True:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        except BlockingIOError:
            if time.monotonic() > deadline:
                return False
            time.sleep(0.05)
