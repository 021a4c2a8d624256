"""A Ray head of one's own that takes jobs: loopback alone, a token at its door, ended by process id."""

import os
import secrets
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from tests.runtime.runs import LOOPBACK, alive, bare_environment, descendants

ROOT = Path(__file__).resolve().parents[2]
BIN = Path(sys.executable).parent
MARK = "OPD_RAY_TESTED_JOB"


@dataclass
class Head:
    """A running head, and how to talk to it."""

    pid: int
    url: str
    token: str

    def ray(self, *args: object, **changes: str) -> subprocess.CompletedProcess[str]:
        """A `ray` command of somebody who has the token."""
        ours = {"RAY_API_SERVER_ADDRESS": self.url, "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": self.token}
        return subprocess.run(
            [BIN / "ray", *map(str, args)],
            cwd=ROOT,
            env=bare_environment() | ours | changes,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=200,
        )

    def submit(self, job: str, *entrypoint: object, wait: bool = True, **variables: str) -> str:
        """`ray job submit` of this checkout; returns what it printed."""
        pairs = ", ".join(f'"{name}": "{value}"' for name, value in {MARK: job, **variables}.items())
        how = ["--submission-id", job, "--working-dir", ".", "--runtime-env-json", f'{{"env_vars": {{{pairs}}}}}']
        done = self.ray("job", "submit", *how, *([] if wait else ["--no-wait"]), "--", *entrypoint)
        assert done.returncode == 0 or wait, done.stdout
        return done.stdout


@contextmanager
def head() -> Iterator[Head]:
    """Start a head; afterwards end it and everything below it."""
    token, (gcs, dashboard, agent, client) = secrets.token_hex(16), free_ports(4)
    # Not below pytest's folder: the paths of Ray's sockets may not be longer than 107 bytes.
    with tempfile.TemporaryDirectory(prefix="jobs-") as folder:
        ports = {"port": gcs, "dashboard-port": dashboard, "dashboard-agent-listen-port": agent}
        ports["ray-client-server-port"] = client
        process = subprocess.Popen(
            [
                *(BIN / "ray", "start", "--head", "--block", "--disable-usage-stats", "--num-cpus=2"),
                *(f"--node-ip-address={LOOPBACK}", f"--dashboard-host={LOOPBACK}", f"--temp-dir={folder}/ray"),
                *(f"--object-store-memory={80 * 2**20}", *(f"--{name}={port}" for name, port in ports.items())),
            ],
            env=bare_environment()
            | {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": token}
            # Otherwise Ray's own processes listen everywhere, and jobs find no opd-ray.
            | {"RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0", "PATH": f"{BIN}:{os.environ['PATH']}"},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        with ExitStack() as ending:
            ending.callback(end, process)
            started = Head(process.pid, f"http://{LOOPBACK}:{dashboard}", token)
            until(lambda: started.ray("job", "list").returncode == 0, 90)
            yield started


def end(process: subprocess.Popen[bytes]) -> None:
    """SIGTERM to `ray start --block`, which ends its own; then by force what is left."""
    below = descendants(process.pid)
    process.terminate()
    try:
        process.wait(timeout=45)
    finally:
        left = alive([process.pid, *below], within_s=15)
        for pid in left:
            os.kill(pid, 9)
        process.wait(timeout=10)


def free_ports(count: int) -> list[int]:
    """Ports on which nobody listens now."""
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for one in sockets:
            one.bind((LOOPBACK, 0))
        return [one.getsockname()[1] for one in sockets]


def processes(job: str) -> list[int]:
    """Everything that runs for a job: supervisor, driver, workers; wherever it hangs now."""
    found = []
    for entry in os.scandir("/proc"):
        if entry.name.isdigit():
            try:
                if f"{MARK}={job}".encode() in Path(entry.path, "environ").read_bytes().split(b"\0"):
                    found.append(int(entry.name))
            except OSError:
                continue
    return found


def until(true: Callable[[], object], within_s: float) -> None:
    """Wait for it."""
    deadline = time.monotonic() + within_s
    while not true():
        assert time.monotonic() < deadline, f"not within {within_s:g} s"
        time.sleep(0.1)
