"""Ray heads of our own on this machine: started together, ended together, never left behind.

A head is a child of this process with a token, ports of its own on loopback, an empty folder to
start in (a job's working directory is its head's, and a clone there would be imported) and a
temporary folder that goes with it. It ends when this process ends, also by kill -9; its folder is
then removed by the next start, which finds the owner's lock free.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from atoll.core.errors import Failed
from atoll.core.journal import log
from atoll.core.ledger import SIGNING_KEY
from atoll.islands.submit import REDIRECTS, Cluster, Jobs

_START_SECONDS = 90.0
_STOP_SECONDS = 20.0
_DEAD_SECONDS = 300.0  # of a folder where nothing has moved
_PREFIX = "atoll-ray-"
PORTS = (
    "--port", "--dashboard-port", "--ray-client-server-port", "--dashboard-agent-listen-port",
    "--dashboard-agent-grpc-port", "--runtime-env-agent-port", "--node-manager-port",
    "--object-manager-port",
)  # fmt: skip


@dataclass(frozen=True)
class HeadOrder:
    """What one head offers. `gpus` are CUDA's numbers, so that two heads never share a device."""

    name: str
    cpus: int
    gpus: tuple[str, ...] = ()
    memory_gib: float | None = None


class Head:
    """One head and its folder."""

    def __init__(self, order: HeadOrder, ports: Sequence[int]) -> None:
        self._order = order
        self._start(ports)

    def _start(self, ports: Sequence[int]) -> None:
        order = self._order
        # Short: the path of a socket below it must stay under 108 bytes.
        self.folder = Path(tempfile.mkdtemp(prefix=_PREFIX, dir="/tmp"))
        self._lock = os.open(self.folder / "lock", os.O_RDWR | os.O_CREAT, 0o600)
        fcntl.flock(self._lock, fcntl.LOCK_EX)
        token = secrets.token_hex(32)
        token_file = self.folder / "token"
        token_file.touch(mode=0o600)
        token_file.write_text(token)
        (self.folder / "empty").mkdir()
        named = dict(zip(PORTS, ports, strict=True))
        memory = (
            [] if order.memory_gib is None else ["--memory", str(int(order.memory_gib * 2**30))]
        )
        command = [
            sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--block",
            "--num-cpus", str(order.cpus), "--num-gpus", str(len(order.gpus)),
            "--disable-usage-stats", *memory,
            "--temp-dir", str(self.folder / "ray"), "--object-store-memory", str(96 << 20),
            "--include-dashboard", "true", "--dashboard-host", "127.0.0.1",
            "--no-monitor",  # the autoscaler's: a head of ours has no machines to add
            *(text for flag, port in named.items() for text in (flag, str(port))),
        ]  # fmt: skip
        out = (self.folder / "head.log").open("wb")
        with out:
            self._process = subprocess.Popen(
                command, env=_environment(order, token_file), cwd=self.folder / "empty",
                stdout=out, stderr=out, stdin=subprocess.DEVNULL, start_new_session=True,
                preexec_fn=_die_with_parent,
            )  # fmt: skip
        self.process = self._process.pid
        self.cluster = Cluster(
            f"http://127.0.0.1:{named['--dashboard-port']}", token, name=order.name,
            python=sys.executable,
        )  # fmt: skip

    def wait(self) -> None:
        """Until the head answers; `Failed` with its last words when it does not."""
        deadline = time.monotonic() + _START_SECONDS
        while time.monotonic() < deadline and self.alive():
            try:
                Jobs(self.cluster)
            except Failed:  # also half-way up: some of its parts answer before others
                time.sleep(0.2)
                continue
            log.debug("a local Ray head answers at %s", self.cluster.address)
            return
        how = f"within {_START_SECONDS:.0f} s" if self.alive() else "and ended"
        raise Failed(
            f"The local Ray head did not start {how}. Its last words:\n{self.last_words()}",
            cure="free memory or ports, or give --address of a running cluster",
        )

    def wait_or_restart(self) -> None:
        """`wait`, and once more at other ports where it ended: others may have taken one."""
        try:
            self.wait()
        except Failed:
            if self.alive():
                raise
            log.warning("a local Ray head ended at its start; once more, at other ports")
            self.restart()

    def alive(self) -> bool:
        """Whether its process is there; without it nothing that it started is of any use."""
        return self._process.poll() is None

    def last_words(self) -> str:
        """The end of what Ray said."""
        return (self.folder / "head.log").read_text(errors="replace")[-2000:]

    def restart(self) -> None:
        """End what is left of it and start anew, at other ports, with another token and folder."""
        self.end()
        self._start(free_ports(len(PORTS)))
        self.wait()

    def ask_to_end(self) -> None:
        """SIGTERM, after which Ray cleans up."""
        if self.alive():
            self._process.send_signal(signal.SIGTERM)

    def end(self) -> None:
        """End it with everything it started, and remove its folder."""
        self.ask_to_end()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(timeout=_STOP_SECONDS)
        # What is left of the session that we started, and of nobody else's.
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        shutil.rmtree(self.folder, ignore_errors=True)
        os.close(self._lock)


@contextlib.contextmanager
def local_heads(orders: Sequence[HeadOrder]) -> Iterator[list[Head]]:
    """Start heads side by side, each with a token of its own, and end them all."""
    if orders:
        remove_dead_folders()
    ports = free_ports(len(PORTS) * len(orders))
    heads: list[Head] = []
    try:
        # All from this thread: a head is told to die with the thread that started it.
        for n, order in enumerate(orders):
            heads.append(Head(order, ports[n * len(PORTS) : (n + 1) * len(PORTS)]))
        for head in heads:
            head.wait_or_restart()
        yield heads
    finally:
        for head in heads:
            head.ask_to_end()
        for head in heads:
            head.end()


def remove_dead_folders(parent: Path = Path("/tmp")) -> None:
    """Remove what heads left whose controller was killed: nobody holds the lock, nothing moves."""
    for folder in parent.glob(f"{_PREFIX}*"):
        with contextlib.suppress(OSError):
            if folder.is_symlink() or folder.stat().st_uid != os.getuid():
                continue
            # A process of Ray that was still ending may have made the folder anew, without a lock.
            lock = os.open(folder / "lock", os.O_RDWR | os.O_CREAT, 0o600)
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                touched = [
                    folder / "lock",
                    folder / "head.log",
                    *folder.glob("ray/session_*/logs/*"),
                ]
                newest = max(path.lstat().st_mtime for path in touched if path.exists())
                if time.time() - newest > _DEAD_SECONDS:
                    log.debug("%s is left of a command that was killed; removed", folder)
                    shutil.rmtree(folder, ignore_errors=True)
            finally:
                os.close(lock)


def _environment(order: HeadOrder, token_file: Path) -> dict[str, str]:
    environment = {
        **{k: v for k, v in os.environ.items() if k not in (*REDIRECTS, SIGNING_KEY)},
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": str(token_file),
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0",
        # What binds every port to loopback, on Linux too: a head of ours is of this machine alone.
        "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
        # Metrics would be served to whoever asks, without a token. The dashboard's server has no
        # switch, and does without where its port cannot be had.
        "RAY_enable_metrics_collection": "0",
        "DASHBOARD_METRIC_PORT": "-1",
        "RAY_JOB_STOP_WAIT_TIME_S": str(int(_STOP_SECONDS)),
        # A head that ends has no node to move work to. Jobs have committed by then, or, where the
        # controller was killed, lose at most one interval.
        "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S": "0",
        # A job's process is its own: the worker that Ray holds ready for it would only take a
        # processor from the job's imports.
        "RAY_prestart_worker_first_driver": "0",
        # Ray's own 15 is for workers that share a machine with what matters more.
        "RAY_worker_niceness": "0",
    }
    environment.pop("RAY_AUTH_TOKEN", None)
    if order.gpus:
        environment["CUDA_VISIBLE_DEVICES"] = ",".join(order.gpus)
    return environment


def free_ports(count: int) -> list[int]:
    """Ports that were free together a moment ago."""
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind(("", 0))
        return [int(each.getsockname()[1]) for each in sockets]


def _die_with_parent() -> None:
    """Linux: SIGTERM to the head when this process is gone (PR_SET_PDEATHSIG = 1)."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGTERM)
