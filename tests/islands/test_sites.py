"""What a job takes of its island, and how many of them fit."""

from __future__ import annotations

import pytest

from atoll.core.errors import ConfigError
from atoll.core.places import Island, Resources
from atoll.islands import sites
from atoll.islands.settings import TrainConfig

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


@pytest.mark.parametrize("resources", [{"gpus": 1}, {"gpus": 8}, {"cpus": 5}])
def test_what_does_not_divide_among_workers_is_refused(resources: dict[str, int]) -> None:
    island = Island(**CLUSTER, resources=Resources(workers=4, **resources))
    with pytest.raises(ConfigError, match="4 workers"):
        plan(island)
    with pytest.raises(ConfigError, match="of its 4"):
        plan(Island(name="a", local=True, resources=Resources(workers=5)))


def test_jobs_at_once_here_are_fewer_where_each_has_workers() -> None:
    assert sites.slots_here(TrainConfig()) == 4
    assert sites.slots_here(TrainConfig(workers=2)) == 2
    assert sites.slots_here(TrainConfig(workers=8)) == 1
