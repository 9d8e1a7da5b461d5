"""What a demo does at each of its sizes; the figures for the digits are those measured best."""

from __future__ import annotations

from atoll.core.config import Config
from atoll.core.embedding import FitConfig
from atoll.islands.settings import BaseConfig, DenoiserTraining, HeadTraining, TrainConfig
from atoll.partitioner.settings import PartitionConfig


class DemoSettings(Config):
    """Everything that a demo is told; saved beside its report."""

    corpus: str | None
    minutes: float | None  # of training, base and islands and control together
    partition: PartitionConfig
    base: BaseConfig
    train: TrainConfig
    # One: two threads of so small a network wait for each other longer than they work.
    threads: int = 1
    pictures: int = 500  # per system in the metrics table
    steps: int = 20
    prompts: int = 10


def settings_for(
    *, corpus: str | None, shards: int, minutes: float | None, smallest: bool
) -> DemoSettings:
    """The digits as tuned, the same barely trained, or another corpus within some minutes."""
    if corpus is not None:
        return DemoSettings(
            corpus=corpus,
            minutes=minutes or (1.0 if smallest else 15.0),
            partition=PartitionConfig(shards=shards),
            base=BaseConfig(),
            train=TrainConfig(head=HeadTraining(images=2_000 if smallest else None)),
            pictures=40 if smallest else 300,
        )
    partition = PartitionConfig(shards=shards, commons="0.25", holdout=0.2)
    if not smallest:
        return DemoSettings(
            corpus=None, minutes=minutes, partition=partition, base=BaseConfig(),
            train=TrainConfig(head=HeadTraining(share=2)),
        )  # fmt: skip
    return DemoSettings(
        corpus=None,
        minutes=minutes,
        partition=partition.model_copy(update={"fit": FitConfig(steps=60)}),
        base=BaseConfig(training=DenoiserTraining(passes=5)),
        train=TrainConfig(
            training=DenoiserTraining(passes=2), head=HeadTraining(images=1_000), preview=4
        ),
        pictures=40,
        steps=8,
    )
