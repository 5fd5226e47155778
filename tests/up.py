"""``moemesh up`` as a process of its own."""

import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager

START_LIMIT_S = 120
STOP_LIMIT_S = 60


@contextmanager
def up(*args: str, **environ: str) -> Iterator[tuple[subprocess.Popen[str], list[str]]]:
    """``moemesh up --port 0 ...`` and the lines of its stderr; killed at the end if it still runs."""
    process = subprocess.Popen(
        [sys.executable, "-m", "shared.cli.main", "up", "--port", "0", *args],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        env=os.environ | environ,
    )
    lines: list[str] = []
    assert process.stderr is not None
    reader = threading.Thread(target=lambda: lines.extend(process.stderr or []), daemon=True)
    reader.start()
    try:
        yield process, lines
    finally:
        if process.poll() is None:
            process.kill()
        process.wait(STOP_LIMIT_S)
        reader.join(STOP_LIMIT_S)
        print("".join(lines))


def ready_url(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    line = process.stdout.readline()
    assert line.startswith("ready http://127.0.0.1:"), line
    return line.split()[1]
