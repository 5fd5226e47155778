"""What a killed process leaves behind goes away with the next start, and nothing else does."""

import subprocess
import sys
from pathlib import Path

import pytest

from shared.cli.owned import OWNER, owned_directory

OWN = """
from shared.cli.owned import owned_directory
with owned_directory("moemesh-test-") as path:
    print(path, flush=True)
    input()
"""


def start(temporary: Path) -> tuple[subprocess.Popen[str], Path]:
    """A process with a directory of its own, and that directory."""
    process = subprocess.Popen(
        [sys.executable, "-c", OWN],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env={"TMPDIR": str(temporary)},
    )  # fmt: skip
    assert process.stdout is not None
    return process, Path(process.stdout.readline().strip())


def test_only_directories_of_processes_that_are_gone_are_removed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    (killed, abandoned), (living, kept) = start(tmp_path), start(tmp_path)
    foreign = tmp_path / "moemesh-test-without-owner"
    foreign.mkdir()
    try:
        killed.kill()
        killed.wait(30)
        assert (abandoned / OWNER).read_text().strip() == str(killed.pid)
        with owned_directory("moemesh-test-") as own:
            assert set(tmp_path.iterdir()) == {own, kept, foreign}
        assert set(tmp_path.iterdir()) == {kept, foreign}
    finally:
        living.communicate("\n", 30)
    assert set(tmp_path.iterdir()) == {foreign}
