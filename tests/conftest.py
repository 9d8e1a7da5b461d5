"""For all tests: Ctrl-C means Ctrl-C, and nothing fails because a machine is slow."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator

import fsspec
import pytest
from hypothesis import HealthCheck, settings

from atoll.core import outage
from tests.outages import Away
from tests.s3 import Gate, serving_s3

# A shell starts its background jobs with SIGINT ignored, and children inherit that.
signal.signal(signal.SIGINT, signal.default_int_handler)

# Two threads on two busy cores are ten times slower than one: OpenMP's barriers spin. It is read
# when torch is loaded, here or by what the tests start.
os.environ["OMP_NUM_THREADS"] = "1"

# By itself an example fails that takes more than 200 ms, as one does while others have the cores.
settings.register_profile("busy", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("busy")


@pytest.fixture(scope="session")
def s3() -> Iterator[Gate]:
    """An S3 server that clients in this process and below it find by themselves."""
    with serving_s3() as gate:
        yield gate


@pytest.fixture
def away(monkeypatch: pytest.MonkeyPatch) -> Iterator[type[Away]]:
    """A store at `away://` that fails as a test says; nobody pauses long."""
    fsspec.register_implementation("away", Away, clobber=True)
    monkeypatch.setattr(outage, "LONGEST_PAUSE", 0.002)
    Away.rule = staticmethod(lambda _request, _path: None)
    yield Away
    Away.failed.clear()
    Away.store.clear()
    Away.pseudo_dirs[:] = [""]
