"""Temporary directories that say who owns them, so that what a killed process has left behind can be removed."""

import fcntl
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

OWNER = "owner"
"""File with the owner's pid. The owner holds a lock on it, which ends with the process, however that ends."""


@contextmanager
def owned_directory(prefix: str) -> Iterator[Path]:
    """A temporary directory until the block ends. Those with the same prefix whose owner is gone are removed first."""
    remove_abandoned(prefix)
    with tempfile.TemporaryDirectory(prefix=prefix) as name:
        fresh = Path(name, OWNER + ".new")
        with fresh.open("w") as owner:
            fcntl.flock(owner, fcntl.LOCK_EX)
            owner.write(f"{os.getpid()}\n")
            owner.flush()
            fresh.rename(fresh.with_name(OWNER))  # nobody sees it without its lock
            yield Path(name)


def remove_abandoned(prefix: str) -> None:
    """Remove directories of `owned_directory` whose process is gone; others, and those of other users, stay."""
    for directory in Path(tempfile.gettempdir()).glob(prefix + "*"):
        if _abandoned(directory):
            shutil.rmtree(directory, ignore_errors=True)


def living(prefix: str) -> list[Path]:
    """This user's directories of `owned_directory` whose process is there, the newest first."""
    mine = [d for d in Path(tempfile.gettempdir()).glob(prefix + "*") if d.stat().st_uid == os.getuid()]
    there = [d for d in mine if (d / OWNER).exists() and not _abandoned(d)]
    return sorted(there, key=lambda directory: -directory.stat().st_mtime)


def _abandoned(directory: Path) -> bool:
    try:
        with (directory / OWNER).open() as owner:
            fcntl.flock(owner, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:  # no such file, not ours to read, or locked
        return False
    return True
