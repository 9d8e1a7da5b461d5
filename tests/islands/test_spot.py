"""Spot notices of three clouds, asked of a real server on this machine."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Iterator

import pytest

from atoll.core.checkpoint import Checkpoints
from atoll.core.errors import Interrupted
from atoll.core.storage import Storage
from atoll.islands import spot
from atoll.islands.loop import Loop
from tests.islands.clouds import Cloud, playing
from tests.islands.test_loop import COURSE, loss_of, module, straight, weights
from tests.waiting import PATIENCE_SECONDS, until


@pytest.fixture
def cloud(monkeypatch: pytest.MonkeyPatch) -> Iterator[Cloud]:
    with playing() as (played, environment):
        for name, place in environment.items():
            monkeypatch.setenv(name, place)
        # A proxy that the environment names is not the machine's own metadata service.
        monkeypatch.setenv("http_proxy", "http://127.0.0.1:1")
        monkeypatch.setattr(spot, "_ANSWER_SECONDS", PATIENCE_SECONDS)
        yield played


@pytest.mark.parametrize("name", spot.NOTICES)
def test_each_cloud_is_silent_until_it_takes_the_machine_back(cloud: Cloud, name: str) -> None:
    assert spot.NOTICES[name]() == ""
    cloud.notice = True
    assert spot.NOTICES[name]()


@pytest.mark.parametrize("name", spot.NOTICES)
def test_a_notice_becomes_a_commit_and_the_rest_is_bitwise(
    cloud: Cloud, tmp_path, name: spot.Cloud
) -> None:
    run = Storage(tmp_path)
    expected = straight(run)

    def notice() -> None:
        cloud.notice = True
        until(lambda: told)

    told: list[int] = []
    network = module()
    loop = Loop(run, "run", network, COURSE, name="run")
    before = signal.getsignal(signal.SIGTERM)

    def loss(first: int, count: int):  # type: ignore[no-untyped-def]
        if first == 200:
            handler = signal.getsignal(signal.SIGTERM)
            signal.signal(signal.SIGTERM, lambda *given: (told.append(1), handler(*given)))  # type: ignore
            notice()
        return loss_of(network)(first, count)

    try:
        with pytest.raises(Interrupted), spot.heeding(name, poll_seconds=0.02):
            loop.run(loss)
    finally:
        signal.signal(signal.SIGTERM, before)
    assert told == [1]
    latest = Checkpoints(run, "run").latest()
    assert latest is not None
    assert latest.images_seen == 204
    network = module()
    Loop(run, "run", network, COURSE, name="run").run(loss_of(network))
    assert all((value == expected[key]).all() for key, value in weights(network).items())


def test_a_service_that_does_not_answer_is_asked_again(cloud: Cloud) -> None:
    cloud.broken = True
    stopped = threading.Event()
    before = signal.signal(signal.SIGTERM, lambda *_: stopped.set())
    try:
        with spot.heeding("azure", poll_seconds=0.02):
            until(lambda: len(cloud.asked) >= 3)
            assert not stopped.is_set()
            cloud.broken, cloud.notice = False, True
            until(stopped.is_set)
    finally:
        signal.signal(signal.SIGTERM, before)


@pytest.mark.parametrize(
    ("vendor", "found"),
    [
        ("Amazon EC2\n", "aws"),
        ("Google\n", "gcp"),
        ("Microsoft Corporation\n", "azure"),
        ("QEMU", None),
    ],
)
def test_the_firmware_says_which_cloud_it_is(tmp_path, monkeypatch, vendor, found) -> None:
    (tmp_path / "sys_vendor").write_text(vendor)
    monkeypatch.setattr(spot, "_VENDOR", tmp_path / "sys_vendor")
    assert spot.cloud_here("auto") == found
    assert spot.cloud_here("off") is None
    assert spot.cloud_here("gcp") == "gcp"


def test_on_no_cloud_nothing_is_asked(cloud: Cloud, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(spot, "_VENDOR", tmp_path / "not there")
    with spot.heeding("auto", poll_seconds=0.01):
        time.sleep(0.1)
    assert cloud.asked == []
