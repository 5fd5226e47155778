"""Where compiled kernels are kept, who compiles them, and the environment of a kernel process."""

import multiprocessing
import os
import stat
import time
from pathlib import Path

import pytest

from shared.kernels.cache import cache_directory, compile_once
from shared.kernels.threads import thread_environment


def test_the_environment_follows_the_number_of_threads_and_keeps_what_is_set(tmp_path: Path) -> None:
    given = {"XDG_CACHE_HOME": str(tmp_path), "OMP_NUM_THREADS": "7"}
    wanted = thread_environment(3, given)
    assert wanted["NUMBA_NUM_THREADS"] == "3"
    assert wanted["OMP_NUM_THREADS"] == "7"
    assert wanted["NUMBA_CACHE_DIR"].startswith(str(tmp_path))


def test_the_cache_lies_under_the_user_s_cache_and_is_private(tmp_path: Path) -> None:
    directory = cache_directory({"HOME": str(tmp_path)})
    assert directory.parent == tmp_path / ".cache" / "moemesh"
    assert stat.S_IMODE(directory.parent.stat().st_mode) == 0o700


@pytest.mark.parametrize("environ", [{}, {"HOME": "/proc/nowhere"}, {"XDG_CACHE_HOME": "/proc/nowhere"}])
def test_without_a_usable_home_the_cache_is_temporary(
    environ: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    assert tmp_path in cache_directory(environ).parents


def _append(directory: Path, log: Path, number: int) -> None:
    def work() -> None:
        with log.open("a") as lines:
            lines.write(f"{number} begins\n")
            lines.flush()
            lines.write(f"{number} ends\n")

    compile_once(directory, work)


def test_processes_that_start_together_compile_one_after_the_other(tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    log = tmp_path / "log"
    started = [context.Process(target=_append, args=(tmp_path / "cache", log, i)) for i in range(3)]
    for process in started:
        process.start()
    for process in started:
        process.join(60)
    lines = log.read_text().splitlines()
    assert len(lines) == 6
    assert all(a.split()[0] == b.split()[0] for a, b in zip(lines[::2], lines[1::2], strict=True))


def test_a_lock_that_is_held_for_ever_delays_only_so_long(tmp_path: Path) -> None:
    done: list[str] = []

    def outer() -> None:
        compile_once(tmp_path, lambda: done.append("inner"), patience=0.1)
        done.append("outer")

    compile_once(tmp_path, outer)
    assert done == ["inner", "outer"]


def test_a_new_cache_removes_those_that_nobody_has_used_for_a_month(tmp_path: Path) -> None:
    def at(path: Path, days_ago: float) -> Path:
        when = time.time() - days_ago * 24 * 3600
        os.utime(path, (when, when))
        return path

    old, used, recent, foreign = (tmp_path / name for name in ("kernels-1", "kernels-2", "kernels-3", "other"))
    for directory in (old, used, recent, foreign):
        directory.mkdir()
        (directory / "lock").touch()
    (used / "complete").touch()
    compile_once(used, lambda: None)
    for directory, days in ((old, 31), (used, 31), (recent, 29), (foreign, 31)):
        at(directory, days)
    compile_once(tmp_path / "kernels-4", lambda: None)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["kernels-2", "kernels-3", "kernels-4", "other"]
    at(at(used / "complete", 31).parent, 31)
    compile_once(tmp_path / "kernels-4", lambda: None)
    assert used.exists(), "only a new cache cleans up"
    compile_once(tmp_path / "kernels-5", lambda: None)
    assert not used.exists()


def test_using_a_cache_keeps_it(tmp_path: Path) -> None:
    compile_once(tmp_path, lambda: None)
    os.utime(tmp_path / "complete", (0, 0))
    compile_once(tmp_path, lambda: None)
    assert (tmp_path / "complete").stat().st_mtime > 0


def test_work_that_fails_leaves_the_cache_incomplete(tmp_path: Path) -> None:
    def fail() -> None:
        raise RuntimeError("no compiler")

    with pytest.raises(RuntimeError):
        compile_once(tmp_path, fail)
    done: list[str] = []
    compile_once(tmp_path, lambda: done.append("again"))
    assert done == ["again"] and (tmp_path / "complete").exists()


def test_work_is_done_even_where_nothing_can_be_written() -> None:
    done: list[str] = []
    for directory in (None, Path("/proc/nowhere")):
        compile_once(directory, lambda: done.append("done"))
    assert done == ["done", "done"]
