"""The environment in which kernels run well; to be set before numba and torch are imported.

Pure: a parent passes the result to its children, a main function puts it into its own environment.
"""

import hashlib
from collections.abc import Mapping
from pathlib import Path

SPIN = 2000
"""Iterations that an idle thread spins before it sleeps: a parallel region right after another starts in about 3 us,
and an idle pool does not burn its cores."""


def thread_environment(threads: int, environ: Mapping[str, str]) -> dict[str, str]:
    """Variables for a process with ``threads`` compute threads (at least 1); what ``environ`` sets already is kept.

    The cache directory carries a digest of these sources, since numba itself notices a change only in the file of the
    outermost kernel. It lies under ``XDG_CACHE_HOME`` (default ``~/.cache``), never beside the sources, which may be
    read-only.
    """
    count = str(max(1, threads))
    wanted = {
        "OMP_NUM_THREADS": count,
        "MKL_NUM_THREADS": count,
        "NUMBA_NUM_THREADS": count,
        "GOMP_SPINCOUNT": str(SPIN),
        "OMP_WAIT_POLICY": "passive",
        "NUMBA_THREADING_LAYER_PRIORITY": "omp tbb workqueue",
        "NUMBA_CACHE_DIR": str(cache_directory(environ)),
    }
    return {name: environ.get(name, value) for name, value in wanted.items()}


def cache_directory(environ: Mapping[str, str]) -> Path:
    """Where compiled kernels are kept: one directory per version of these sources."""
    home = Path(environ.get("HOME") or "/tmp")
    base = Path(environ.get("XDG_CACHE_HOME") or home / ".cache")
    sources = sorted(Path(__file__).parent.glob("*.py"))
    digest = hashlib.sha256(b"\0".join(source.read_bytes() for source in sources)).hexdigest()
    return base / "moemesh" / f"kernels-{digest[:16]}"
