"""For all tests: Ctrl-C means Ctrl-C, and nothing fails because a machine is slow."""

from __future__ import annotations

import signal
from collections.abc import Iterator

import pytest
from hypothesis import HealthCheck, settings

from tests.s3 import Gate, serving_s3

# A shell starts its background jobs with SIGINT ignored, and children inherit that.
signal.signal(signal.SIGINT, signal.default_int_handler)

# By itself an example fails that takes more than 200 ms, as one does while others have the cores.
settings.register_profile("busy", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("busy")


@pytest.fixture(scope="session")
def s3() -> Iterator[Gate]:
    """An S3 server that clients in this process and below it find by themselves."""
    with serving_s3() as gate:
        yield gate
