"""The environment in which kernels run well; to be set before numba and torch are imported.

Sets nothing itself: a parent passes the result to its children, a main function puts it into its own environment.
"""

from collections.abc import Mapping

from shared.kernels.cache import cache_directory

SPIN = 2000
"""Iterations that an idle thread spins before it sleeps: a parallel region right after another starts in about 3 us,
and an idle pool does not burn its cores."""


def thread_environment(threads: int, environ: Mapping[str, str]) -> dict[str, str]:
    """Variables for a process with ``threads`` compute threads (at least 1); what ``environ`` sets already is kept."""
    count = str(max(1, threads))
    wanted = {
        "OMP_NUM_THREADS": count,
        "MKL_NUM_THREADS": count,
        "NUMBA_NUM_THREADS": count,
        "GOMP_SPINCOUNT": str(SPIN),
        "NUMBA_THREADING_LAYER_PRIORITY": "omp tbb workqueue",  # omp needs libgomp.so.1, which slim images lack
        "NUMBA_CACHE_DIR": str(cache_directory(environ)),
    }
    return {name: environ.get(name, value) for name, value in wanted.items()}
