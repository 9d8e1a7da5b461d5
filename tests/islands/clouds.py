"""Three clouds' metadata services, as a real server on this machine plays them."""

from __future__ import annotations

import contextlib
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

NOTICE = json.dumps({"action": "terminate", "time": "2026-11-20T08:22:00Z"})


class Cloud:
    """What the services say, and what they were asked."""

    def __init__(self) -> None:
        self.notice = False
        self.once = False  # whether AWS has no notice for the machine after the one it told
        self.broken = False
        self.asked: list[str] = []

    def answer(self, method: str, path: str, headers: dict[str, str]) -> tuple[int, str]:
        self.asked.append(f"{method} {path}")
        if self.broken:
            return 500, "{"
        if path == "/latest/api/token":
            assert method == "PUT"
            assert headers["X-Aws-Ec2-Metadata-Token-Ttl-Seconds"] == "60"
            return 200, "secret"
        if path == "/latest/meta-data/spot/instance-action":
            if headers.get("X-Aws-Ec2-Metadata-Token") != "secret":
                return 401, ""
            told, self.notice = self.notice, self.notice and not self.once
            return (200, NOTICE) if told else (404, "")
        if path == "/computeMetadata/v1/instance/preempted":
            if headers.get("Metadata-Flavor") != "Google":
                return 403, ""
            return 200, "TRUE" if self.notice else "FALSE"
        assert path == "/metadata/scheduledevents?api-version=2020-07-01"
        if headers.get("Metadata") != "true":
            return 400, ""
        events = [{"EventType": "Reboot"}]
        if self.notice:
            events.append({"EventType": "Preempt"})
        return 200, json.dumps({"Events": events})


@contextlib.contextmanager
def playing() -> Iterator[tuple[Cloud, dict[str, str]]]:
    """The services, and the environment in which they are asked."""
    played = Cloud()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            headers = {name.title(): value for name, value in self.headers.items()}
            code, text = played.answer(self.command, self.path, headers)
            self.send_response(code)
            self.end_headers()
            self.wfile.write(text.encode())

        do_PUT = do_GET

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    place = f"127.0.0.1:{server.server_address[1]}"
    names = ("AWS_EC2_METADATA_SERVICE_ENDPOINT", "AZURE_METADATA_SERVICE_ENDPOINT")
    try:
        yield played, {**dict.fromkeys(names, f"http://{place}/"), "GCE_METADATA_HOST": place}
    finally:
        server.shutdown()
        server.server_close()
