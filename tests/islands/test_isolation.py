"""Isolation as the kernel and as strangers see it: no network is needed, and no port is open."""

from __future__ import annotations

import contextlib
import shutil
import socket
import subprocess
import sys
import urllib.request
from collections import defaultdict
from dataclasses import replace
from pathlib import Path

import grpc
import psutil
import pytest

from atoll.islands import heads
from atoll.islands.heads import Head, HeadOrder, local_heads
from atoll.islands.submit import Jobs, TokenRefused
from tests.islands.conftest import answer
from tests.islands.kills import command_lines, expect_none_left, family
from tests.islands.test_job import finish, finish_here, order
from tests.waiting import PATIENCE_SECONDS, until

NO_NETWORK = ("unshare", "--map-root-user", "--net")
WEB = ("--dashboard-port", "--dashboard-agent-listen-port", "--runtime-env-agent-port")
# Behind every other port is gRPC. Of each one of Ray's own methods, which takes an empty message.
METHODS = {
    "--port": "NodeInfoGcsService/GetAllNodeInfo",
    "--ray-client-server-port": "RayletDriver/Init",
    "--node-manager-port": "NodeManagerService/GetNodeStats",
    "--object-manager-port": "ObjectManagerService/Pull",
    "--dashboard-agent-grpc-port": "LogService/ListLogs",
}
OF_A_WORKER = "CoreWorkerService/NumPendingTasks"  # whose port Ray chooses
# What Ray's dashboard shows to whoever asks, without a switch: a page that asks for the token, and
# that it lives. Nothing of a run.
PUBLIC = ("/", "/api/authentication_mode", "/api/gcs_healthz")


def test_an_island_without_any_network_comes_to_the_same(fresh) -> None:
    allowed = shutil.which("unshare") and not subprocess.run([*NO_NETWORK, "true"]).returncode
    if not allowed:
        pytest.skip("no network namespace may be made here")
    with socket.create_server(("127.0.0.1", 0)) as door:
        knock = f"import socket; socket.create_connection({door.getsockname()!r})"
        outside = [sys.executable, "-c", knock]
        assert subprocess.run(outside).returncode == 0
        shut = subprocess.run([*NO_NETWORK, *outside], capture_output=True, text=True)
        assert "unreachable" in shut.stderr
    here, manifest = fresh("outside")
    shard = next(iter(manifest.shards))
    order(here, manifest, shard)
    run, manifest = fresh("inside")
    order(run, manifest, shard)
    assert finish(run, shard, within=NO_NETWORK) == finish_here(here, shard)


def test_a_head_is_this_machines_alone_and_refuses_strangers_on_every_port(tmp_path: Path) -> None:
    program = tmp_path / "asleep"
    program.write_text(f"#!{sys.executable}\nimport time\ntime.sleep({PATIENCE_SECONDS})\n")
    program.chmod(0o755)
    with local_heads([HeadOrder("local", 1)]) as (head,):
        cluster, named = head.cluster, ports(head)
        # A job at work, so that its worker's port is there too.
        job = {"submission_id": "asleep", "threads": 1, "cpus": 1, "gpus": 0}
        Jobs(replace(cluster, python=str(program))).submit("run", "shard", **job)
        until(lambda: named.keys() <= listening(head).keys() and command_lines(str(program)))

        found = listening(head)
        assert {ip.removeprefix("::ffff:") for ips in found.values() for ip in ips} == {"127.0.0.1"}
        checked = set()
        for port in found:
            name = named.get(port, "a worker's")
            said = [at_port(head, port, token) for token in (None, "0" * 64, cluster.token)]
            if port not in listening(head):  # a worker that had nothing to do
                continue
            assert said == ["refused", "refused", "let in"], name
            checked.add(name)
        assert checked == {*named.values(), "a worker's"}
        for token, expected in ((None, 401), ("0" * 64, 403), (cluster.token, 200)):
            assert answer(cluster, token) == expected
        for path in PUBLIC:
            with urllib.request.urlopen(f"{cluster.address}{path}") as shown:
                assert shown.status == 200
        assert (head.folder / "token").stat().st_mode & 0o077 == 0
        assert head.folder.stat().st_mode & 0o077 == 0
        with pytest.raises(TokenRefused, match="refuses the token"):
            Jobs(type(cluster)(cluster.address, "0" * 64))
    expect_none_left(str(head.folder))
    expect_none_left(str(program))
    assert not head.folder.exists()


def ports(head: Head) -> dict[int, str]:
    """The ports that a head was given, and what for."""
    told = psutil.Process(head.process).cmdline()
    return {int(told[told.index(name) + 1]): name for name in heads.PORTS}


def listening(head: Head) -> dict[int, set[str]]:
    """The TCP ports of a head and of all that it started, and at which addresses they are."""
    found = defaultdict(set)
    for process in family(psutil.Process(head.process)):
        with contextlib.suppress(psutil.NoSuchProcess):
            for connection in process.net_connections("tcp"):
                if connection.status == psutil.CONN_LISTEN:
                    found[connection.laddr.port].add(connection.laddr.ip)
    return found


def at_port(head: Head, port: int, token: str | None) -> str:
    """What becomes of somebody who knocks with this token, or without."""
    name = ports(head).get(port, "")
    if name in WEB:
        said = answer(replace(head.cluster, address=f"http://127.0.0.1:{port}"), token)
        # The Jobs API is behind one of the three; past the door of the others it is not found.
        return {401: "refused", 403: "refused", 200: "let in", 404: "let in"}[said]
    headers = [] if token is None else [("authorization", f"Bearer {token}")]
    with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
        call = channel.unary_unary(f"/ray.rpc.{METHODS.get(name, OF_A_WORKER)}")
        try:
            call(b"", metadata=headers, timeout=PATIENCE_SECONDS)
        except grpc.RpcError as error:
            code = error.code()
            if code is grpc.StatusCode.UNAUTHENTICATED:
                return "refused"
            return {grpc.StatusCode.UNAVAILABLE: "gone", grpc.StatusCode.UNIMPLEMENTED: "lost"}.get(
                code, "let in"
            )
    return "let in"
