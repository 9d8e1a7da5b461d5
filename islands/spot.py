"""Notices that a cloud will take this machine back, turned into SIGTERM: commit and leave.

Nothing in open-source Ray does this. A thread asks the machine's own metadata service every few
seconds; which one is told by the firmware, so that nothing is asked on a machine of no cloud.

AWS: instance-action, two minutes ahead (docs.aws.amazon.com, "Spot Instance interruption notices").
Google Cloud: `preempted`, 30 seconds. Azure: scheduled events of type Preempt, 30 seconds.
"""

from __future__ import annotations

import contextlib
import json
import os
import threading
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Literal

from atoll.core.journal import log
from atoll.islands.signs import sigterm

Cloud = Literal["auto", "off", "aws", "gcp", "azure"]

POLL_SECONDS = 5.0
_ANSWER_SECONDS = 2.0
_LINK_LOCAL = "http://169.254.169.254"
_VENDOR = Path("/sys/class/dmi/id/sys_vendor")
_VENDORS = {"Amazon EC2": "aws", "Google": "gcp", "Microsoft Corporation": "azure"}


def _ask(url: str, headers: Mapping[str, str], method: str = "GET") -> str:
    """The answer's text; an empty one for "not found". A proxy is never asked instead."""
    request = urllib.request.Request(url, headers=dict(headers), method=method)
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(request, timeout=_ANSWER_SECONDS) as answer:
            return str(answer.read().decode(errors="replace"))
    except urllib.error.HTTPError as error:
        if error.code == 404:
            return ""
        raise


def _aws() -> str:
    base = os.environ.get("AWS_EC2_METADATA_SERVICE_ENDPOINT", _LINK_LOCAL).rstrip("/")
    age = {"X-aws-ec2-metadata-token-ttl-seconds": "60"}
    token = {"X-aws-ec2-metadata-token": _ask(f"{base}/latest/api/token", age, "PUT")}
    return _ask(f"{base}/latest/meta-data/spot/instance-action", token)


def _gcp() -> str:
    host = os.environ.get("GCE_METADATA_HOST", "metadata.google.internal")
    url = f"http://{host}/computeMetadata/v1/instance/preempted"
    said = _ask(url, {"Metadata-Flavor": "Google"})
    return "preempted" if said.strip() == "TRUE" else ""


def _azure() -> str:
    base = os.environ.get("AZURE_METADATA_SERVICE_ENDPOINT", _LINK_LOCAL).rstrip("/")
    said = _ask(f"{base}/metadata/scheduledevents?api-version=2020-07-01", {"Metadata": "true"})
    events = json.loads(said or "{}").get("Events", [])
    return next((json.dumps(event) for event in events if event["EventType"] == "Preempt"), "")


# Each: what the cloud says about taking the machine back, empty while it says nothing.
NOTICES: dict[str, Callable[[], str]] = {"aws": _aws, "gcp": _gcp, "azure": _azure}


def cloud_here(cloud: Cloud) -> str | None:
    """The cloud that this machine is of, by its firmware where it is not told; None for none."""
    if cloud != "auto":
        return None if cloud == "off" else cloud
    with contextlib.suppress(OSError):
        return _VENDORS.get(_VENDOR.read_text().strip())
    return None


@contextlib.contextmanager
def heeding(
    cloud: Cloud, *, leave: Callable[[], None] = sigterm, poll_seconds: float = POLL_SECONDS
) -> Iterator[None]:
    """Inside, a notice becomes SIGTERM to this process, or another way to `leave`, once."""
    here = cloud_here(cloud)
    if here is None:
        yield
        return
    done = threading.Event()

    def watch() -> None:
        while not done.wait(poll_seconds):
            try:
                said = NOTICES[here]()
            except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
                log.debug("the metadata service of %s did not answer: %s", here, error)
                continue
            if said:
                log.warning("%s takes this machine back, committing: %s", here, said[:200])
                leave()
                return

    watcher = threading.Thread(target=watch, name="spot", daemon=True)
    watcher.start()
    try:
        yield
    finally:
        done.set()
