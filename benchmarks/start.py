"""How long `atoll train` takes from its call to the first step of its first island.

A real head on this machine, a real job, the smallest recipe on handwritten digits: what passes is
the start of Ray, of two interpreters and of torch, and what the first step waits for besides. The
least that it could be is measured in turns with it: the same head, and a job of Ray's own client
that only imports torch and diffusers' network.
"""

from __future__ import annotations

import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from ray.job_submission import JobSubmissionClient

from atoll.cli.digits import write_digits
from atoll.core.embedding import FitConfig
from atoll.core.storage import Storage
from atoll.islands.base import train_base
from atoll.islands.heads import HeadOrder, local_heads
from atoll.islands.settings import BaseConfig, DenoiserTraining, TrunkTraining
from atoll.islands.signs import ask_to_stop, island_folder
from atoll.partitioner.pipeline import partition
from atoll.partitioner.settings import PartitionConfig

_SHARD = "shard-00"
_LONGEST_SECONDS = 300.0


def seconds_to_first_step() -> float:
    """Until a heartbeat tells of a step that was taken; the island is then asked to stop."""
    with tempfile.TemporaryDirectory() as scratch:
        run = Storage(Path(scratch) / "run")
        settings = PartitionConfig(shards=2, commons="0.25", fit=FitConfig(steps=5))
        manifest = partition(write_digits(Storage(scratch)), run, settings)
        training = DenoiserTraining(passes=0.1, checkpoints=1)
        trunk = TrunkTraining(images=256, width=8)
        config = BaseConfig(recipe="unet-tiny", training=training, trunk=trunk)
        train_base(run, manifest, config)
        command = ["train", run.uri, f"--shard={_SHARD}", "--passes=1000", "--set", "slots=1"]
        started = time.monotonic()
        process = subprocess.Popen(
            [sys.executable, "-P", "-c", "from atoll.cli.main import run; run()", *command],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        try:
            heartbeat = f"{island_folder(_SHARD)}/heartbeat.json"
            _until(lambda: run.exists(heartbeat), lambda: process.poll() is None, started)
            return time.monotonic() - started
        finally:
            ask_to_stop(run, _SHARD)
            process.wait()


def seconds_of_an_empty_job() -> float:
    """Until a job on the same head has imported what every expert needs; it trains nothing."""
    with tempfile.TemporaryDirectory() as scratch:
        imported = Path(scratch) / "imported"
        program = (
            "import torch, pathlib; from diffusers import UNet2DConditionModel; "
            f"pathlib.Path({str(imported)!r}).touch()"
        )
        started = time.monotonic()
        with local_heads([HeadOrder("empty", cpus=1)]) as (head,):
            cluster = head.cluster
            client = JobSubmissionClient(
                cluster.address, headers={"Authorization": f"Bearer {cluster.token}"}
            )
            client.submit_job(
                entrypoint=shlex.join([sys.executable, "-P", "-c", program]),
                entrypoint_num_cpus=1,
            )
            _until(imported.exists, head.alive, started)
            return time.monotonic() - started


def _until(seen: Callable[[], bool], alive: Callable[[], bool], started: float) -> None:
    while not seen():
        if not alive() or time.monotonic() - started > _LONGEST_SECONDS:
            raise SystemExit("the job did not come as far as it should")
        time.sleep(0.02)
