"""Where training happens: chosen by name, put back afterwards, the same bits on a GPU again."""

from __future__ import annotations

import os
import subprocess
import sys
import time
import timeit

import pytest
import torch

from atoll.core.errors import ConfigError
from atoll.core.storage import Storage
from atoll.islands.compute import chosen_device, computing, device_name, matmul_rate
from atoll.islands.island import run_island
from tests.islands.conftest import TRAIN
from tests.islands.test_job import RESULTS, order

gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
no_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")


@no_gpu
def test_without_a_gpu_auto_is_the_cpu_and_cuda_is_refused() -> None:
    assert chosen_device("auto") == chosen_device("cpu") == torch.device("cpu")
    with pytest.raises(ConfigError, match="no CUDA device"):
        chosen_device("cuda")


def test_a_processor_is_named_by_its_model_and_its_instructions() -> None:
    """Of which the bits depend: another set of them is another processor to a resume."""
    here = device_name(torch.device("cpu"))
    assert torch.backends.cpu.get_cpu_capability() in here
    program = (
        "import torch; from atoll.islands.compute import device_name; "
        "print(device_name(torch.device('cpu')))"
    )
    least = {**os.environ, "ATEN_CPU_CAPABILITY": "default"}
    there = subprocess.run(
        [sys.executable, "-c", program], env=least, check=True, capture_output=True, text=True
    ).stdout.strip()
    assert there != here
    assert there.rpartition(", ")[0] == here.rpartition(", ")[0]


def test_threads_and_kernels_are_put_back() -> None:
    before = torch.get_num_threads()
    with computing("cpu", before + 1):
        assert torch.get_num_threads() == before + 1
    assert torch.get_num_threads() == before
    assert not torch.are_deterministic_algorithms_enabled()


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=[gpu, pytest.mark.gpu])])
def test_the_rate_is_that_of_a_matrix_product_and_draws_nothing(device: str) -> None:
    side = 4096 if device == "cuda" else 512

    def quotient(chosen: torch.device) -> float:
        rate = matmul_rate(chosen, torch.float32)
        matrix = torch.ones(side, side, device=chosen)
        timed = timeit.Timer(lambda: (matrix @ matrix)[0, 0].item())  # waits for it
        return rate / (2 * side**3 / min(timed.repeat(repeat=50, number=1)))

    before = torch.random.get_rng_state()
    with computing("auto" if device == "cuda" else "cpu", 1) as chosen:
        # Cores are shared, and not always alike in both measurements.
        assert any(0.3 < quotient(chosen) < 3 for _ in range(5))
        started = time.monotonic()
        matmul_rate(chosen, torch.float32)
        assert time.monotonic() - started < 30  # 0.1 s on an idle core
    assert torch.equal(torch.random.get_rng_state(), before)


@gpu
@pytest.mark.gpu
def test_an_island_on_a_gpu_is_bitwise_repeatable(fresh) -> None:
    found = []
    for name in ("first", "second"):
        run, manifest = fresh(name)
        shard = next(iter(manifest.shards))
        order(run, manifest, shard, TRAIN.model_copy(update={"device": "cuda"}))
        run_island(run.uri, shard)
        found.append({part: Storage(run.uri).sha256(f"islands/{shard}/{part}") for part in RESULTS})
    assert found[0] == found[1]
