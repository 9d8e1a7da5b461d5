"""Ray, and nothing else of Ray in Atoll: a local head when none is given, and jobs through its API.

A head of ours is a child of this process with a token, ports of its own, an empty folder to start
in (a job's working directory is its head's, and a clone there would be imported) and a temporary
folder that goes with it. It ends when this process ends, also by kill -9.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import secrets
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from atoll.core.errors import Failed, MissingError, UsageError
from atoll.core.journal import log
from atoll.islands.job import SUBMISSION_VARIABLE

_START_SECONDS = 90.0
_STOP_SECONDS = 20.0
# What would make a client talk to another cluster than the one it was given.
_REDIRECTS = ("RAY_ADDRESS", "RAY_API_SERVER_ADDRESS", "RAY_JOB_HEADERS")
_PORTS = (
    "--port", "--dashboard-port", "--ray-client-server-port", "--dashboard-agent-listen-port",
    "--dashboard-agent-grpc-port", "--metrics-export-port", "--runtime-env-agent-port",
    "--node-manager-port", "--object-manager-port",
)  # fmt: skip


@dataclass(frozen=True)
class Cluster:
    """Where jobs are submitted: the address of the Jobs API and the token it asks for."""

    address: str
    token: str
    python: str = "python"  # the interpreter there that has atoll


def remote_cluster(address: str) -> Cluster:
    """A cluster that is already there; its token comes from the environment alone."""
    token = os.environ.get("RAY_AUTH_TOKEN", "")
    path = os.environ.get("RAY_AUTH_TOKEN_PATH", "")
    if not token and path:
        try:
            token = Path(path).read_text().strip()
        except OSError as error:
            raise MissingError(f"The token file of RAY_AUTH_TOKEN_PATH: {error}") from error
    if not address.startswith(("http://", "https://")):
        raise UsageError(
            f"'{address}' is not an address of a Ray Jobs API",
            allowed="http://HOST:PORT or https://HOST:PORT",
        )
    return Cluster(address, token)


@contextlib.contextmanager
def local_head(cpus: int, gpus: int = 0) -> Iterator[Cluster]:
    """Start a Ray head on this machine, and end it with everything it started."""
    # Short: the path of a socket below it must stay under 108 bytes.
    folder = Path(tempfile.mkdtemp(prefix="atoll-ray-", dir="/tmp"))
    token = secrets.token_hex(32)
    token_file = folder / "token"
    token_file.touch(mode=0o600)
    token_file.write_text(token)
    (folder / "empty").mkdir()
    ports = dict(zip(_PORTS, _free_ports(len(_PORTS)), strict=True))
    command = [
        sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--block",
        "--num-cpus", str(cpus), "--num-gpus", str(gpus), "--disable-usage-stats",
        "--temp-dir", str(folder / "ray"), "--object-store-memory", str(96 << 20),
        "--include-dashboard", "true", "--dashboard-host", "127.0.0.1",
        *(text for flag, port in ports.items() for text in (flag, str(port))),
    ]  # fmt: skip
    environment = {
        **{k: v for k, v in os.environ.items() if k not in _REDIRECTS},
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": str(token_file),
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0",
        "RAY_JOB_STOP_WAIT_TIME_S": str(int(_STOP_SECONDS)),
    }
    environment.pop("RAY_AUTH_TOKEN", None)
    with (folder / "head.log").open("wb") as out:
        head = subprocess.Popen(
            command, env=environment, cwd=folder / "empty", stdout=out, stderr=out,
            stdin=subprocess.DEVNULL, start_new_session=True, preexec_fn=_die_with_parent,
        )  # fmt: skip
    try:
        cluster = Cluster(
            f"http://127.0.0.1:{ports['--dashboard-port']}", token, python=sys.executable
        )
        _wait_for(cluster, head, folder / "head.log")
        log.debug("a local Ray head answers at %s", cluster.address)
        yield cluster
    finally:
        _end(head)
        shutil.rmtree(folder, ignore_errors=True)


class Jobs:
    """The Jobs API of one cluster."""

    def __init__(self, cluster: Cluster) -> None:
        self._python = cluster.python
        from ray.exceptions import RayError
        from ray.job_submission import JobSubmissionClient

        for name in _REDIRECTS:
            os.environ.pop(name, None)
        headers = {"Authorization": f"Bearer {cluster.token}"} if cluster.token else {}
        try:
            self._client = JobSubmissionClient(cluster.address, headers=headers)
        except (ConnectionError, RuntimeError, RayError) as error:
            raise Failed(
                f"The Ray cluster at {cluster.address} does not answer as it should: {error}",
                cure="check the address, and RAY_AUTH_TOKEN or RAY_AUTH_TOKEN_PATH",
            ) from error

    def submit(
        self, run_uri: str, shard: str, *, submission_id: str, threads: int, gpus: int
    ) -> str:
        """Start an island's job in a process of its own, with processors of its own."""
        # `exec` lets the process die with its raylet; -P keeps the working directory off the path.
        program = "-P -m atoll.islands.job"
        command = f"exec {shlex.quote(self._python)} {program}"
        threads_text = str(threads)
        return str(
            self._client.submit_job(
                entrypoint=f"{command} {shlex.quote(run_uri)} {shlex.quote(shard)}",
                submission_id=submission_id,
                entrypoint_num_cpus=threads,
                entrypoint_num_gpus=gpus,
                runtime_env={
                    "env_vars": {
                        "OMP_NUM_THREADS": threads_text,
                        "MKL_NUM_THREADS": threads_text,
                        SUBMISSION_VARIABLE: submission_id,
                    }
                },
            )
        )

    def ended(self, submission_id: str) -> bool:
        """Whether the job is over, as far as Ray knows: a hint, `exit.json` is the word."""
        return bool(self._client.get_job_status(submission_id).is_terminal())

    def logs(self, submission_id: str) -> str:
        """What the job wrote."""
        return str(self._client.get_job_logs(submission_id))

    def stop(self, submission_id: str) -> None:
        """SIGTERM, on which a job commits and leaves."""
        with contextlib.suppress(RuntimeError):
            self._client.stop_job(submission_id)


def _free_ports(count: int) -> list[int]:
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


def _wait_for(cluster: Cluster, head: subprocess.Popen[bytes], log_file: Path) -> None:
    deadline = time.monotonic() + _START_SECONDS
    request = urllib.request.Request(
        f"{cluster.address}/api/version", headers={"Authorization": f"Bearer {cluster.token}"}
    )
    while time.monotonic() < deadline and head.poll() is None:
        try:
            with urllib.request.urlopen(request, timeout=2) as answer:
                if answer.status == 200:
                    return
        except (urllib.error.URLError, OSError):
            time.sleep(0.2)
    tail = log_file.read_text(errors="replace")[-2000:]
    raise Failed(
        f"The local Ray head did not start within {_START_SECONDS:.0f} s. Its last words:\n{tail}",
        cure="free memory or ports, or give --address of a running cluster",
    )


def _end(head: subprocess.Popen[bytes]) -> None:
    if head.poll() is None:
        head.send_signal(signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            head.wait(timeout=_STOP_SECONDS)
    # What is left of the session that we started, and of nobody else's.
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(head.pid, signal.SIGKILL)
    head.wait()
