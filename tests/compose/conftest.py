"""The image and the engine of the container tests. Where no engine can run, says so where nobody can miss it."""

import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.compose.engine import Engine, EngineUnavailable, finish, start_debootstrap, start_download, why_not


@pytest.fixture(scope="module")
def engine() -> Iterator[Engine]:
    """A running engine that has the image; skips the test when this machine cannot run one."""
    if reason := why_not():
        pytest.skip(f"NO CONTAINER ENGINE: {reason}")
    home = Path(tempfile.mkdtemp(prefix="moemesh-"))
    engine = Engine(home)
    try:
        prepare(engine)
        yield engine
    except EngineUnavailable as error:
        pytest.skip(f"NO CONTAINER ENGINE: {error}")
    finally:
        engine.stop()
        shutil.rmtree(home)


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
