"""The image and the engine of the container tests. Where no engine can run, says so where nobody can miss it."""

import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.compose.engine import Engine, EngineUnavailable, finish, start_debootstrap, start_download, why_not

IMAGES_BYTES = 12 << 30
"""Twice what base, image and containers take."""


@pytest.fixture(scope="module")
def engine() -> Iterator[Engine]:
    """A running engine that has the image; skips the test when this machine cannot run one."""
    if reason := why_not():
        pytest.skip(f"NO CONTAINER ENGINE: {reason}")
    home = Path(tempfile.mkdtemp(prefix="moemesh-", dir=roomy_memory()))
    engine = Engine(home)
    try:
        prepare(engine)
        yield engine
    except EngineUnavailable as error:
        pytest.skip(f"NO CONTAINER ENGINE: {error}")
    finally:
        engine.stop()
        shutil.rmtree(home)


def roomy_memory() -> Path | None:
    """A file system in memory with room for the images: layers of 40,000 files are slow on disk. None without one."""
    memory = Path("/dev/shm")
    lines = Path("/proc/meminfo").read_text().splitlines()
    (available,) = (int(line.split()[1]) << 10 for line in lines if line.startswith("MemAvailable"))
    fits = memory.is_dir() and min(available, shutil.disk_usage(memory).free) > IMAGES_BYTES
    return memory if fits else None


def prepare(engine: Engine) -> None:
    """Start the engine and build the image. Raises EngineUnavailable, and CommandFailed when the build is broken."""
    engine.start()
    rootfs, wheels = engine.home / "rootfs", engine.home / "wheels"
    works = [(start_debootstrap(rootfs), "debootstrap"), (start_download(wheels), "pip download")]
    try:
        for process, what in works:
            finish(process, what)
    finally:
        for process, _ in works:
            process.kill()
            process.wait()
    engine.import_base(rootfs)
    shutil.rmtree(rootfs)
    engine.build(wheels)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Containers that were not tested are news, also in a run that prints only dots."""
    reasons = {str(report.longrepr[2]) for report in terminalreporter.stats.get("skipped", []) if report.longrepr}
    for reason in sorted(reasons):
        if "NO CONTAINER ENGINE" in reason:
            terminalreporter.section("CONTAINERS WERE NOT TESTED", sep="!", red=True, bold=True)
            terminalreporter.write_line(reason)
