"""How long `atoll train` takes from its call to the first step of its first island.

A real head on this machine, a real job, the smallest recipe on handwritten digits: what passes is
the start of Ray, of two interpreters and of torch, and what the first step waits for besides.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time
from pathlib import Path

from atoll.cli.digits import write_digits
from atoll.core.embedding import FitConfig
from atoll.core.storage import Storage
from atoll.islands.base import train_base
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
            return _until(run, f"{island_folder(_SHARD)}/heartbeat.json", process, started)
        finally:
            ask_to_stop(run, _SHARD)
            process.wait()


def _until(run: Storage, name: str, process: subprocess.Popen[bytes], started: float) -> float:
    while not run.exists(name):
        if process.poll() is not None or time.monotonic() - started > _LONGEST_SECONDS:
            raise SystemExit("`atoll train` took no step")
        time.sleep(0.02)
    return time.monotonic() - started
