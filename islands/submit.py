"""Ray's Jobs API over HTTP, and nothing else of Ray: submit, ask, read, stop.

Every call has a time limit, which Ray's own client has not: a cluster that is stopped in its tracks
accepts a connection and never answers. No redirection is followed, which would carry the token to a
stranger, and no variable that leads Ray's client elsewhere is read.
Source: https://docs.ray.io/en/latest/cluster/running-applications/job-submission/rest.html
"""

from __future__ import annotations

import hashlib
import io
import json
import shlex
import ssl
import urllib.error
import urllib.request
import zipfile
from dataclasses import dataclass, field
from email.message import Message
from pathlib import Path
from typing import IO, Any
from urllib.parse import quote, urlsplit

import atoll
import atoll.core
import atoll.islands
from atoll.core.errors import Failed
from atoll.core.journal import log
from atoll.core.places import RAY_TOKEN, Island
from atoll.islands.signs import SUBMISSION_VARIABLE

# What would make a client of Ray's talk to another cluster than the one it was given.
REDIRECTS = ("RAY_ADDRESS", "RAY_API_SERVER_ADDRESS", "RAY_JOB_HEADERS")
_ANSWER_SECONDS = 5.0
_SUBMIT_SECONDS = 60.0
ENDED = {"SUCCEEDED", "FAILED", "STOPPED"}
# An island runs these and nothing else of ours; the layering test holds them to it.
_SHIPPED = (atoll, atoll.core, atoll.islands)


class Unreachable(Failed):
    """A cluster that does not answer, or not now."""


class TokenRefused(Unreachable):
    """A cluster that answers and does not take the token, until it is given another."""


class NotThere(Failed):
    """A cluster that answers and knows nothing of what was asked for."""


@dataclass(frozen=True)
class Cluster:
    """Where jobs are submitted: the address of the Jobs API and the token it asks for."""

    address: str
    token: str = field(repr=False)
    token_place: tuple[str, str] = ("", "")  # the variable or else the file it was read from
    name: str = "cluster"
    python: str = "python"  # the interpreter there
    ship: bool = False  # whether our code is sent along
    ca: str | None = None
    verify: bool = True


def remote_cluster(island: Island) -> Cluster:
    """A cluster that is already there; `MissingError` where its token is not to be had."""
    assert island.address is not None
    return Cluster(
        island.address.rstrip("/"), island.token(), token_place=island.token_place(),
        name=island.name, python=island.python, ship=island.ship, ca=island.tls.ca,
        verify=island.tls.verify,
    )  # fmt: skip


class Jobs:
    """One cluster's Jobs API.

    Every call raises `Unreachable` where it does not answer, `TokenRefused` where it answers 401 or
    403, `NotThere` where it answers 404, and `Failed` where it refuses what was asked.
    """

    def __init__(self, cluster: Cluster, *, ask: bool = True) -> None:
        self._cluster = cluster
        self._code: tuple[str, bytes] | None = None
        handlers: list[urllib.request.BaseHandler] = [_NoRedirect()]
        if urlsplit(cluster.address).hostname in ("127.0.0.1", "localhost", "::1"):
            handlers.append(urllib.request.ProxyHandler({}))
        if cluster.address.startswith("https:"):
            handlers.append(urllib.request.HTTPSHandler(context=_tls(cluster)))
        self._opener = urllib.request.build_opener(*handlers)
        if ask:
            self.check()

    def check(self) -> None:
        """Raise where the cluster does not answer, or does not take the token."""
        self.version()
        self._json("GET", "/api/jobs/")

    def version(self) -> str:
        """Ray's version there, and a sign that it answers."""
        return str(self._json("GET", "/api/version").get("ray_version", ""))

    def submit(
        self,
        run_uri: str,
        shard: str,
        *,
        submission_id: str,
        threads: int,
        cpus: int,
        gpus: int,
        memory_gib: float | None = None,
        workers: int = 1,
    ) -> str | None:
        """Start an island's job in a process of its own; the sha256 of the code that was sent.

        Several workers are launched by that process, which takes nothing itself: what is asked for
        is theirs, each an equal part.
        """
        environment = {
            "OMP_NUM_THREADS": str(threads),
            "MKL_NUM_THREADS": str(threads),
            SUBMISSION_VARIABLE: submission_id,
        }
        runtime: dict[str, Any] = {"env_vars": environment}
        sha256 = None
        if self._cluster.ship:
            runtime["py_modules"] = [self._send_code()]
            assert self._code is not None
            sha256 = self._code[0]
        # `exec` lets the process die with its raylet; -P keeps the working directory off the path.
        program = f"exec {shlex.quote(self._cluster.python)} -P -m atoll.islands.job"
        memory = int((memory_gib or 0) * 2**30)
        each = (
            f"--workers {workers} --worker-cpus {cpus // workers} --worker-gpus {gpus // workers}"
        )
        each += f" --worker-memory {memory // workers}"
        order: dict[str, Any] = {
            "entrypoint": f"{program} {shlex.quote(run_uri)} {shlex.quote(shard)}",
            "submission_id": submission_id,
            "runtime_env": runtime,
        }
        if workers > 1:
            order["entrypoint"] += f" {each}"
        else:
            order |= {"entrypoint_num_cpus": cpus, "entrypoint_num_gpus": gpus}
            order |= {"entrypoint_memory": memory} if memory else {}
        try:
            self._json("POST", "/api/jobs/", order, seconds=_SUBMIT_SECONDS)
        except Failed as error:
            # The first try may have arrived and its answer not.
            if "already exists" not in str(error):
                raise
        return sha256

    def details(self, submission_id: str) -> dict[str, Any]:
        """What Ray knows of a job: `status`, `driver_exit_code`, `entrypoint` and more."""
        return dict(self._json("GET", f"/api/jobs/{quote(submission_id)}"))

    def status(self, submission_id: str) -> str:
        """PENDING, RUNNING, or one of `ENDED`: a hint, `exit.json` is the word."""
        return str(self.details(submission_id)["status"])

    def logs(self, submission_id: str) -> str:
        """What the job wrote."""
        text = str(self._json("GET", f"/api/jobs/{quote(submission_id)}/logs").get("logs") or "")
        return self._without_token(text)

    def stop(self, submission_id: str) -> None:
        """SIGTERM, on which a job commits and leaves; one that is gone is fine."""
        try:
            self._json("POST", f"/api/jobs/{quote(submission_id)}/stop")
        except Unreachable:
            raise
        except Failed as error:
            log.debug("%s was not stopped: %s", submission_id, error)

    def _send_code(self) -> str:
        """Upload our code where it is not there yet; Ray's name of it.

        Not the wheel: Ray installs a wheel with pip, its dependencies too, torch first of all.
        """
        if self._code is None:
            data = shipped_code()
            self._code = hashlib.sha256(data).hexdigest(), data
        sha256, data = self._code
        name = f"_ray_pkg_{sha256[:32]}.zip"
        try:
            self._ask("GET", f"/api/packages/gcs/{name}")
        except Unreachable:
            raise
        except Failed:
            self._ask("PUT", f"/api/packages/gcs/{name}", data, seconds=_SUBMIT_SECONDS)
        return f"gcs://{name}"

    def _json(
        self, method: str, path: str, value: Any = None, *, seconds: float | None = None
    ) -> Any:
        data = None if value is None else json.dumps(value).encode()
        answer = self._ask(method, path, data, seconds=seconds)
        try:
            return json.loads(answer)
        except ValueError:
            raise Unreachable(f"{self._name} does not answer with JSON") from None

    def _ask(
        self, method: str, path: str, data: bytes | None = None, *, seconds: float | None = None
    ) -> bytes:
        headers = {"Content-Type": "application/json"}
        if self._cluster.token:
            headers["Authorization"] = f"Bearer {self._cluster.token}"
        request = urllib.request.Request(
            f"{self._cluster.address}{path}", data=data, headers=headers, method=method
        )
        try:
            with self._opener.open(request, timeout=seconds or _ANSWER_SECONDS) as answer:
                return bytes(answer.read())
        except urllib.error.HTTPError as error:
            words = error.read(2000).decode(errors="replace").strip()
            words = self._without_token(f"{error.code} {words or error.reason}")
            if error.code in (401, 403):
                raise self._refused(words) from None
            what = f"{self._name} does not answer as it should: {words}"
            if error.code in (408, 425, 429, 502, 503, 504) or "try again later" in words:
                raise Unreachable(what, cure="wait, or check the address") from None
            kind = NotThere if error.code == 404 else Failed
            raise kind(what, cure="check the address") from None
        except (OSError, ValueError) as error:  # refused, timed out, cut off, no certificate
            reason = getattr(error, "reason", error)
            raise Unreachable(
                f"{self._name} does not answer: {reason}",
                cure="check the address, and tls where it is https",
            ) from None

    def _refused(self, words: str) -> TokenRefused:
        """Which token was refused, by its place, and how to mend that."""
        variable, file = self._cluster.token_place
        if not self._cluster.token:
            return TokenRefused(
                f"{self._name} asks for a token and was given none: {words}",
                cure=f"name it with token_env or token_file of the island, or export {RAY_TOKEN}",
            )
        if variable:  # what is exported elsewhere does not reach a command at work
            place = f" of ${variable}"
            cure = f"export the cluster's token as {variable} and run the same command again"
        elif file:
            place = f" of {file}"
            cure = f"write the cluster's token into {file}; a command at work reads it again"
        else:
            place, cure = "", "check the address"
        return TokenRefused(f"{self._name} refuses the token{place}: {words}", cure=cure)

    def _without_token(self, text: str) -> str:
        return text.replace(self._cluster.token, "***") if self._cluster.token else text

    @property
    def _name(self) -> str:
        return f"Island {self._cluster.name} at {self._cluster.address}"


def shipped_code() -> bytes:
    """The part of Atoll that an island runs, as the zip that `py_modules` takes; the same bytes."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for package in _SHIPPED:
            folder = Path(package.__path__[0])
            for file in sorted(folder.iterdir()):
                if file.suffix == ".py" or file.name == "py.typed":
                    info = zipfile.ZipInfo(f"{package.__name__.replace('.', '/')}/{file.name}")
                    info.external_attr = 0o644 << 16
                    archive.writestr(info, file.read_bytes(), zipfile.ZIP_DEFLATED)
    return buffer.getvalue()


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    def redirect_request(
        self,
        req: urllib.request.Request,
        fp: IO[bytes],
        code: int,
        msg: str,
        headers: Message,
        newurl: str,
    ) -> None:
        return None


def _tls(cluster: Cluster) -> ssl.SSLContext:
    try:
        context = ssl.create_default_context(cafile=cluster.ca)
    except OSError as error:
        raise Failed(
            f"The CA file of island '{cluster.name}' cannot be read: {error.strerror or error}",
            cure="correct tls.ca",
        ) from None
    if not cluster.verify:
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
    return context
