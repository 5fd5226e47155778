"""A container engine for the tests: dockerd, started by hand, in a network namespace of its own.

Nothing of it outlives `Engine.stop`: socket, images and volumes lie below one temporary directory, bridges and firewall
rules in the namespace. Needs root and no registry: the base image is made by debootstrap, packages come from wheels.
"""

import json
import os
import resource
import shutil
import subprocess
import sys
import time
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
CONTEXT = (
    "pyproject.toml",
    "constraints.txt",
    "README.md",
    "LICENSE",
    ".dockerignore",
    "services",
    "shared",
    "compose",
)
BASE = "moemesh-test-base"
IMAGE = "moemesh-test"
START_LIMIT_S = 60.0
_ASK = """
import http.client, json, sys, urllib.error, urllib.request
url, body, timeout = json.load(sys.stdin)
request = urllib.request.Request(url, body and json.dumps(body).encode(), {"content-type": "application/json"})
try:
    try:
        answer = urllib.request.urlopen(request, timeout=timeout)
    except urllib.error.HTTPError as error:
        answer = error
    found = answer.status, answer.read().decode()
except (OSError, http.client.HTTPException) as error:
    found = 0, repr(error)
print(json.dumps(found))
"""


class EngineUnavailable(Exception):
    """No engine can run here; the message says why and what would help."""


class CommandFailed(Exception):
    """A command that must work has failed; the message holds its last output."""


def why_not() -> str | None:
    """Why no engine can be started on this machine, or None."""
    if os.geteuid() != 0:
        return "starting dockerd needs root"
    tools = ("dockerd", "docker", "docker-compose", "iptables", "debootstrap", "ip", "unshare", "nsenter")
    if absent := [tool for tool in tools if shutil.which(tool) is None]:
        packages = "docker.io docker-compose iptables debootstrap iproute2"
        return f"not installed: {', '.join(absent)} (apt-get install {packages})"
    return None


class Engine:
    """dockerd and what the tests ask of it. ``home`` is an empty directory with a short path."""

    def __init__(self, home: Path) -> None:
        self.home = home
        self.context = home / "context"
        """A copy of what the image is built from, with wheels."""
        self._process: subprocess.Popen[bytes] | None = None
        self._log = home / "dockerd.log"

    # ---- life ---------------------------------------------------------------------------------------------

    def start(self) -> None:
        """Raises EngineUnavailable with the daemon's last words."""
        run = self.home / "run"
        dockerd = ["dockerd", f"--host={self._socket}", f"--data-root={self.home / 'data'}", f"--exec-root={run}"]
        options = [f"--pidfile={self.home / 'pid'}", "--bridge=none"]
        script = 'ip link set lo up && exec "$@"'
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(
                ["unshare", "--net", "sh", "-c", script, "sh", *dockerd, *options], stdout=log, stderr=log
            )
        deadline = time.monotonic() + START_LIMIT_S
        while self._try("docker", "info").returncode != 0:
            if self._process.poll() is not None or time.monotonic() > deadline:
                lines = self._log.read_text(errors="replace").splitlines()[-5:]
                raise EngineUnavailable("dockerd does not start: " + " | ".join(lines))
            time.sleep(0.2)

    def stop(self) -> None:
        """Remove every container and end the daemon."""
        if self._process is None:
            return
        if self._process.poll() is None:
            names = self._try("docker", "ps", "--all", "--quiet").stdout.split()
            if names:
                self._try("docker", "rm", "--force", "--volumes", *names)
            self._process.terminate()
        try:
            self._process.wait(60)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    # ---- images -------------------------------------------------------------------------------------------

    def build(self, wheels: Path) -> None:
        """Build IMAGE as a user without a network would: base without torch, every package from ``wheels``."""
        for name in CONTEXT:
            source, target = ROOT / name, self.context / name
            self.context.mkdir(exist_ok=True)
            ignore = shutil.ignore_patterns("__pycache__", "*.whl")
            shutil.copytree(source, target, ignore=ignore) if source.is_dir() else shutil.copy2(source, target)
        shutil.copytree(ROOT / "models" / "demo", self.context / "models" / "demo")
        for wheel in wheels.iterdir():
            os.link(wheel, self.context / "compose" / "wheels" / wheel.name)
        arguments = ["--build-arg", f"BASE_IMAGE={BASE}", "--build-arg", "PIP_NO_INDEX=1", "--network", "none"]
        self.command(
            "docker", "build", "--quiet", "-f", "compose/Dockerfile", "-t", IMAGE, *arguments, ".", limit_s=600
        )

    def import_base(self, rootfs: Path) -> None:
        """Make a directory the image BASE."""
        archive = self.home / "base.tar"
        self.command("tar", "-C", str(rootfs), "-cf", str(archive), ".", limit_s=120)
        self.command("docker", "import", str(archive), BASE, limit_s=120)
        archive.unlink()

    # ---- commands -----------------------------------------------------------------------------------------

    def command(self, *command: str, limit_s: float = 60) -> str:
        """Run a command against this engine; its stdout. Raises CommandFailed."""
        done = self._try(*command, limit_s=limit_s)
        if done.returncode:
            words = " ".join(command[:6])
            raise CommandFailed(f"{words} ... ended with {done.returncode}: {done.stdout[-2000:]}{done.stderr[-4000:]}")
        return done.stdout

    def compose(self, *arguments: str, limit_s: float = 180) -> str:
        """``docker-compose`` with the CPU file; its scheduler may use this engine."""
        files = (option for name in ("cpu", "scale") for option in ("-f", f"compose/compose.{name}.yaml"))
        return self.command("docker-compose", *files, *arguments, limit_s=limit_s)

    def ask(self, url: str, body: Mapping[str, Any] | None = None, limit_s: float = 60) -> tuple[int, str]:
        """GET, or POST of a JSON body, from the engine's host; (status, text), status 0 when nobody answers."""
        assert self._process is not None
        command = ["nsenter", f"--net=/proc/{self._process.pid}/ns/net", sys.executable, "-c", _ASK]
        question = json.dumps([url, body, limit_s])
        done = subprocess.run(command, input=question, capture_output=True, text=True, timeout=limit_s + 30, check=True)
        status, text = json.loads(done.stdout)
        return status, text

    @property
    def _socket(self) -> str:
        return f"unix://{self.home / 'docker.sock'}"

    def _try(self, *command: str, limit_s: float = 60) -> subprocess.CompletedProcess[str]:
        settings = {"DOCKER_HOST": self._socket, "DOCKER_BUILDKIT": "0", "COMPOSE_PROJECT_NAME": "mesh"}
        kept = {"PATH": os.environ["PATH"], "HOME": str(self.home)}
        ours = {"MOEMESH_IMAGE": IMAGE, "MOEMESH_MEMLOCK": str(resource.getrlimit(resource.RLIMIT_MEMLOCK)[1])}
        socket = self.home / "docker.sock"
        if socket.exists():
            ours |= {"DOCKER_SOCKET": str(socket), "DOCKER_GROUP": str(socket.stat().st_gid)}
        where = self.context if self.context.exists() else self.home
        return subprocess.run(
            command, env=kept | settings | ours, cwd=where, capture_output=True, text=True, timeout=limit_s, check=False
        )


# ---- what an image is made of -----------------------------------------------------------------------------


def start_debootstrap(target: Path) -> subprocess.Popen[bytes]:
    """A small Debian with Python and pip, in the background (about a minute)."""
    command = ["debootstrap", "--variant=minbase", "--include=python3,python3-pip", "bookworm", str(target)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)


def start_download(target: Path) -> subprocess.Popen[bytes]:
    """The pinned wheels of moemesh for the base's Python, in the background, from wherever this machine's pip looks."""
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--dest", str(target), "--constraint", "constraints.txt"]
    options = ["--only-binary", ":all:", "--python-version", "3.11"]
    command = [*pip, *options, *dependencies(), "setuptools>=77"]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)


def dependencies() -> list[str]:
    """What moemesh needs at run time, without its development tools."""
    return tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]


def finish(process: subprocess.Popen[bytes], what: str, limit_s: float = 300) -> None:
    """Wait for a background command. Raises EngineUnavailable: without it there is no image."""
    try:
        output, _ = process.communicate(timeout=limit_s)
    except subprocess.TimeoutExpired:
        process.kill()
        raise EngineUnavailable(f"{what} took more than {limit_s:.0f} s") from None
    if process.returncode:
        raise EngineUnavailable(f"{what} failed: {output.decode(errors='replace')[-500:]}")
