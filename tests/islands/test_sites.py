"""What a job takes of its island, how many of them fit, and what is said of one that is away."""

from __future__ import annotations

import http.server
import logging
from pathlib import Path

import pytest

from atoll.core.errors import ConfigError
from atoll.core.places import Island, Resources
from atoll.islands import sites
from atoll.islands.settings import TrainConfig
from atoll.islands.submit import Jobs, Unreachable, remote_cluster
from tests.islands.test_submit import _Server, serving
from tests.waiting import until

CLUSTER = {"name": "a", "address": "http://h:1"}


def plan(island: Island, **config: object) -> sites._SitePlan:
    (found,) = sites._plans([island], TrainConfig(**config), shards=9)
    return found


@pytest.fixture(autouse=True)
def _four_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sites, "_devices", lambda: ["0", "1", "2", "3"])


def test_one_worker_takes_one_gpu_and_its_threads() -> None:
    local = plan(Island(name="a", local=True), threads=3)
    assert (local.workers, local.job_cpus, local.job_gpus, local.jobs) == (1, 3, 1, 4)
    remote = plan(Island(**CLUSTER), device="cuda")
    assert (remote.workers, remote.job_cpus, remote.job_gpus, remote.jobs) == (1, 1, 1, 1)


def test_workers_take_a_gpu_and_their_threads_each() -> None:
    local = plan(Island(name="a", local=True), workers=2, threads=3)
    assert (local.workers, local.job_cpus, local.job_gpus, local.jobs) == (2, 6, 2, 2)
    assert (local.cpus, local.devices) == (12, ("0", "1", "2", "3"))
    on_cpu = plan(Island(name="a", local=True), workers=2, device="cpu")
    assert (on_cpu.job_cpus, on_cpu.job_gpus) == (2, 0)
    remote = plan(Island(**CLUSTER), workers=8, device="cuda")
    assert (remote.workers, remote.job_cpus, remote.job_gpus) == (8, 8, 8)


def test_an_island_has_its_own_number_of_workers() -> None:
    island = Island(**CLUSTER, resources=Resources(workers=4, gpus=4, cpus=16))
    found = plan(island, workers=2)
    assert (found.workers, found.job_cpus, found.job_gpus) == (4, 16, 4)


def test_processors_that_no_thread_uses_are_said_aloud(caplog: pytest.LogCaptureFixture) -> None:
    plan(Island(**CLUSTER, resources=Resources(cpus=8)), threads=8)
    assert not caplog.records
    plan(Island(**CLUSTER, resources=Resources(cpus=8)), threads=2)
    assert "takes 8 CPUs and computes on 2: --set threads=8" in caplog.text


@pytest.mark.parametrize("resources", [{"gpus": 1}, {"gpus": 8}, {"cpus": 5}])
def test_what_does_not_divide_among_workers_is_refused(resources: dict[str, int]) -> None:
    island = Island(**CLUSTER, resources=Resources(workers=4, **resources))
    with pytest.raises(ConfigError, match="4 workers"):
        plan(island)
    with pytest.raises(ConfigError, match="of its 4"):
        plan(Island(name="a", local=True, resources=Resources(workers=5)))


def test_a_job_that_never_fits_is_refused() -> None:
    small = {"name": "a", "local": True, "memory_gib": 1.5}
    assert plan(Island(**small, resources=Resources(memory_gib=1.5))).jobs == 4
    with pytest.raises(ConfigError, match=r"takes 2 GiB and it has 1\.5"):
        plan(Island(**small, resources=Resources(memory_gib=2)))


def test_jobs_at_once_here_are_fewer_where_each_has_workers() -> None:
    assert sites.slots_here(TrainConfig()) == 4
    assert sites.slots_here(TrainConfig(workers=2)) == 2
    assert sites.slots_here(TrainConfig(workers=8)) == 1


def test_a_site_tells_of_each_change_once_and_of_no_single_miss(
    monkeypatch, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    """A cluster that is slow once, silent, back with another token, and given that."""
    caplog.set_level(logging.WARNING, "atoll")
    monkeypatch.setattr(sites, "_ASK_AGAIN_SECONDS", 0.0)
    held, code, asked = tmp_path / "token", {"good": 503}, []
    held.write_text("first")

    class Cluster(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            good = self.headers["Authorization"] == f"Bearer {token}"
            asked.append(self.path)
            self.send_response(code["good"] if good else 403)
            self.end_headers()
            self.wfile.write(b"{}")

        def log_message(self, *_given: object) -> None:
            return

    token = "first"
    with serving(_Server(("127.0.0.1", 0), Cluster)) as port:
        island = Island(name="b", address=f"http://127.0.0.1:{port}", token_file=str(held))
        site = sites.Site(island, Jobs(remote_cluster(island), ask=False), 1, 1, 0)

        def said() -> list[str]:
            return [record.getMessage().partition(";")[0] for record in caplog.records]

        def ask(times: int) -> None:
            enough = len(asked) + times
            until(lambda: site.ask_again() or len(asked) >= enough or site.silent_since is None)

        where = f"Island b at http://127.0.0.1:{port}"
        site.missed(Unreachable("late"))
        code["good"] = 200
        ask(2)
        assert site.silent_since is None
        assert said() == []

        code["good"] = 503
        site.missed(Unreachable("late"))
        ask(3)
        silent = f"{where} does not answer as it should: 503 {{}}"
        assert said() == [silent]
        token = "second"
        ask(3)
        refused = f"{where} refuses the token of {held}: 403 {{}}"
        assert said() == [silent, refused]
        assert site.trouble.startswith(refused)
        held.unlink()
        until(lambda: site.ask_again() or len(said()) == 3)
        assert "cannot be read" in said()[2]
        held.write_text("second")
        code["good"] = 200
        until(lambda: site.ask_again() or site.silent_since is None)
        assert said()[3:] == ["Island b answers again"]
        assert site.trouble == ""
