"""An S3 server on loopback, so that what object storage must do is tested on object storage.

It is moto's, with what moto lacks: one request at a time, since moto looks whether an object is
there and writes it in two steps, and no access to the bucket itself, as an island with credentials
for its prefix alone has none.
"""

from __future__ import annotations

import contextlib
import socket
import threading
from collections.abc import Callable, Iterable, Iterator
from typing import Any
from urllib.parse import parse_qs

import pytest
from werkzeug.serving import make_server

BUCKET = "runs"
_DUMMY = {
    "AWS_ACCESS_KEY_ID": "nobody",
    "AWS_SECRET_ACCESS_KEY": "nothing",
    "AWS_DEFAULT_REGION": "us-east-1",
    "AWS_EC2_METADATA_DISABLED": "true",
    "AWS_MAX_ATTEMPTS": "1",  # of botocore; s3fs has its own five besides
    "NO_PROXY": "127.0.0.1",
    "AWS_CONFIG_FILE": "/dev/null",
    "AWS_SHARED_CREDENTIALS_FILE": "/dev/null",
}
_DENIED = b"<Error><Code>AccessDenied</Code><Message>not your bucket</Message></Error>"

Environ = dict[str, Any]
App = Callable[[Environ, Any], Iterable[bytes]]


class Gate:
    """Lets requests through one by one; a test sets what else happens to them."""

    def __init__(self, app: App) -> None:
        self._app = app
        self._turn = threading.Lock()
        self.ignores_conditions = False  # as older stores do
        self.names_conditions = True  # where one does not hold; AWS does, others do not
        self.away = False
        self.loses_answers = 0  # so many are carried out, and never said to be
        self.turned_away = 0  # requests meanwhile

    def __call__(self, environ: Environ, respond: Any) -> Iterable[bytes]:
        if self.away:
            self.turned_away += 1
            environ["werkzeug.socket"].shutdown(socket.SHUT_RDWR)
            raise ConnectionError
        if self.ignores_conditions:
            environ.pop("HTTP_IF_NONE_MATCH", None)
        if _on_the_bucket(environ):
            respond("403 Forbidden", [("Content-Type", "application/xml")])
            return [] if environ["REQUEST_METHOD"] == "HEAD" else [_DENIED]
        with self._turn:
            said = b"".join(self._app(environ, respond))
        if self.loses_answers:
            self.loses_answers -= 1
            environ["werkzeug.socket"].shutdown(socket.SHUT_RDWR)
            raise ConnectionError
        return [said if self.names_conditions else said.replace(b"Condition>", b"Remark...>")]


def _on_the_bucket(environ: Environ) -> bool:
    """Whether it asks for the bucket, and not for what is below a prefix of it."""
    if environ["PATH_INFO"].strip("/") != BUCKET:
        return False
    asked = parse_qs(environ["QUERY_STRING"], keep_blank_values=True)
    return "delete" not in asked and not any(asked.get("prefix", []))


@contextlib.contextmanager
def serving_s3() -> Iterator[Gate]:
    """The server, with the environment that leads every client here to it, and an empty bucket."""
    from moto.core import DEFAULT_ACCOUNT_ID
    from moto.moto_server.werkzeug_app import (
        DomainDispatcherApplication,
        MotoRequestHandler,
        create_backend_app,
    )
    from moto.s3.models import s3_backends

    class Quiet(MotoRequestHandler):
        def log(self, *_given: Any) -> None:
            return

    s3_backends[DEFAULT_ACCOUNT_ID]["aws"].create_bucket(BUCKET, "us-east-1")
    gate = Gate(DomainDispatcherApplication(create_backend_app))
    server = make_server("127.0.0.1", 0, gate, threaded=True, request_handler=Quiet)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    with pytest.MonkeyPatch.context() as patch:
        for name, value in _DUMMY.items():
            patch.setenv(name, value)
        patch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{server.server_port}")
        yield gate
    server.shutdown()
    server.server_close()
