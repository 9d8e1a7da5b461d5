"""The client of the Jobs API: TLS, proxies, redirections, time limits, and the code it sends."""

from __future__ import annotations

import contextlib
import http.server
import io
import shutil
import socket
import socketserver
import ssl
import subprocess
import sys
import threading
import time
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from atoll.core.errors import Failed
from atoll.core.places import Island
from atoll.islands import submit
from atoll.islands.submit import (
    Cluster,
    Jobs,
    TokenRefused,
    Unreachable,
    remote_cluster,
    shipped_code,
)
from tests.islands.conftest import local_head
from tests.waiting import PATIENCE_SECONDS

TOKEN = "7f3a9c0d1e2b4a5968778695a4b3c2d1"


class _Server(socketserver.ThreadingMixIn, socketserver.TCPServer):
    daemon_threads = True
    allow_reuse_address = True


@contextlib.contextmanager
def serving(server: socketserver.BaseServer) -> Iterator[int]:
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield server.server_address[1]  # type: ignore[index]
    finally:
        server.shutdown()
        server.server_close()


def tls_before(port: int, certificate: Path, key: Path) -> _Server:
    """A server that speaks TLS and hands on what it hears, as an ingress does."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)

    class Handler(socketserver.BaseRequestHandler):
        def handle(self) -> None:
            with (
                contextlib.suppress(OSError),
                context.wrap_socket(self.request, server_side=True) as near,
                socket.create_connection(("127.0.0.1", port)) as far,
            ):
                back = threading.Thread(target=pump, args=(far, near), daemon=True)
                back.start()
                pump(near, far)
                back.join()

    return _Server(("127.0.0.1", 0), Handler)


def pump(source: socket.socket, sink: socket.socket) -> None:
    with contextlib.suppress(OSError):
        while data := source.recv(65536):
            sink.sendall(data)
        sink.shutdown(socket.SHUT_WR)


@pytest.mark.skipif(shutil.which("openssl") is None, reason="makes its certificate with openssl")
def test_tls_is_checked_by_the_ca_that_is_named_and_no_proxy_comes_between(
    tmp_path: Path, monkeypatch
) -> None:
    certificate, key = tmp_path / "ca.pem", tmp_path / "key.pem"
    subprocess.run(
        [
            "openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2",
            "-keyout", key, "-out", certificate, "-subj", "/CN=island",
            "-addext", "subjectAltName=IP:127.0.0.1",
        ],
        check=True, capture_output=True,
    )  # fmt: skip
    monkeypatch.setattr(submit, "_ANSWER_SECONDS", PATIENCE_SECONDS)
    for name in ("http_proxy", "https_proxy", "RAY_ADDRESS", "RAY_API_SERVER_ADDRESS"):
        monkeypatch.setenv(name, "http://127.0.0.1:1")
    with local_head(1) as head:
        (tmp_path / "token").write_text(head.token)
        server = tls_before(int(head.address.rsplit(":", 1)[1]), certificate, key)
        with serving(server) as port:

            def jobs(tls: dict[str, object], scheme: str = "https") -> Jobs:
                address = f"{scheme}://127.0.0.1:{port}"
                token_file = str(tmp_path / "token")
                island = Island(name="a", address=address, token_file=token_file, tls=tls)
                return Jobs(remote_cluster(island))

            assert jobs({"ca": str(certificate)}).version()
            assert jobs({"verify": False}).version()
            with pytest.raises(Unreachable, match="certificate"):
                jobs({})
            with pytest.raises(Unreachable):
                jobs({}, "http")
            with pytest.raises(Failed, match="CA file"):
                jobs({"ca": str(tmp_path / "nowhere")})


def test_a_redirection_does_not_carry_the_token_away() -> None:
    heard: list[str] = []

    class Stranger(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            heard.append(str(self.headers))
            self.send_response(200)
            self.end_headers()
            self.wfile.write(b"{}")

        def log_message(self, *_given: object) -> None:
            return

    with serving(_Server(("127.0.0.1", 0), Stranger)) as elsewhere:

        class Leading(Stranger):
            def do_GET(self) -> None:
                self.send_response(302)
                self.send_header("Location", f"http://localhost:{elsewhere}/")
                self.end_headers()

        with (
            serving(_Server(("127.0.0.1", 0), Leading)) as port,
            pytest.raises(Failed, match="302") as raised,
        ):
            Jobs(Cluster(f"http://127.0.0.1:{port}", TOKEN))
    assert heard == []
    assert TOKEN not in str(raised.value)


@pytest.mark.parametrize("code", [401, 403])
def test_a_refusal_says_where_the_token_is_and_never_what_it_is(
    tmp_path: Path, monkeypatch, code: int
) -> None:
    class Echoing(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(code)
            self.end_headers()
            self.wfile.write(f"not '{self.headers['Authorization']}'".encode())

        def log_message(self, *_given: object) -> None:
            return

    held = tmp_path / "token"
    held.write_text(TOKEN)
    monkeypatch.setenv("B_TOKEN", TOKEN)
    for name in ("RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"):
        monkeypatch.delenv(name, raising=False)
    with serving(_Server(("127.0.0.1", 0), Echoing)) as port:
        address = f"http://127.0.0.1:{port}"

        def refusal(**token: str) -> TokenRefused:
            with pytest.raises(TokenRefused) as raised:
                Jobs(remote_cluster(Island(name="b", address=address, **token)))
            assert TOKEN not in str(raised.value)
            return raised.value

        by_file = refusal(token_file=str(held))
        expected = f"Island b at {address} refuses the token of {held}: {code} not 'Bearer ***'"
        assert by_file.what == expected
        assert f"write the cluster's token into {held}" in by_file.cure
        by_variable = refusal(token_env="B_TOKEN")
        assert "refuses the token of $B_TOKEN" in by_variable.what
        assert "export the cluster's token as B_TOKEN" in by_variable.cure
        without = refusal()
        assert "asks for a token and was given none" in without.what
        assert "token_env or token_file" in without.cure


def test_what_never_answers_is_given_up_in_time(monkeypatch) -> None:
    monkeypatch.setattr(submit, "_ANSWER_SECONDS", 0.3)
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        begun = time.monotonic()
        with pytest.raises(Unreachable, match="does not answer"):
            Jobs(Cluster(f"http://127.0.0.1:{silent.getsockname()[1]}", TOKEN))
        assert time.monotonic() - begun < 60  # and not for ever


def test_the_code_that_goes_along_is_an_island_s_and_runs_alone(tmp_path: Path) -> None:
    data = shipped_code()
    assert data == shipped_code()
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        names = archive.namelist()
        archive.extractall(tmp_path)
    assert {name.rsplit("/", 1)[0] for name in names} == {"atoll", "atoll/core", "atoll/islands"}
    code = "import atoll.islands.job as job; print(job.__file__)"
    said = subprocess.run(
        [sys.executable, "-P", "-c", code],
        env={"PYTHONPATH": str(tmp_path)}, capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert Path(said.stdout.strip()).is_relative_to(tmp_path)
