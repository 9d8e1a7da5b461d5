"""What training is told: the typed configuration of a base, of experts and of the gate."""

from __future__ import annotations

import math
from typing import Annotated, Literal

from pydantic import Field

from atoll.core.config import Config
from atoll.core.denoiser import Card
from atoll.core.errors import ConfigError
from atoll.core.flow import Prediction
from atoll.core.manifest import Plan
from atoll.core.places import Island
from atoll.core.recipes import Recipe
from atoll.core.schedule import NoiseSchedule
from atoll.islands.compute import Device
from atoll.islands.learner import Parallel
from atoll.islands.spot import Cloud

_Decay = Annotated[float, Field(ge=0, lt=1)]
# Fewer than this and a classifier of any size knows little.
_LEAST_IMAGES = 4_000


class OptimizerConfig(Config):
    """AdamW (Loshchilov & Hutter 2019, arXiv 1711.05101) with a warm-up and a linear decay to 0."""

    learning_rate: float | None = Field(default=None, gt=0)  # None takes the recipe's
    weight_decay: float = Field(default=0.01, ge=0)
    beta1: float = Field(default=0.9, ge=0, lt=1)
    beta2: float = Field(default=0.99, ge=0, lt=1)
    warmup: float = Field(default=0.1, ge=0, le=1)  # share of images_seen
    clip: float = Field(default=1.0, gt=0)  # largest norm of the gradient
    kernel: Literal["fused", "foreach"] = "fused"  # torch's two implementations


class TimeConfig(Config):
    """How training times are drawn (SD3, arXiv 2403.03206, section 3.1)."""

    sampling: Literal["logit-normal", "uniform", "mode"] = "logit-normal"
    mean: float = 0.0  # of logit-normal
    std: float = Field(default=1.0, gt=0)
    scale: float = Field(default=1.29, ge=-1, le=1.75)  # of mode; 1.29 is SD3's


class WeightConfig(Config):
    """What an error at time t weighs in the loss.

    `cosmap` is SD3's (eq. 21): 2 / (pi (1 - 2 t + 2 t^2)). `min-snr` (Hang et al. 2023, arXiv
    2303.09556, eq. 8) is min(SNR, gamma) on the error of x_data, whatever the network predicts.
    """

    kind: Literal["none", "cosmap", "min-snr"] = "none"
    gamma: float = Field(default=5.0, gt=0)


class GuardConfig(Config):
    """When an update is refused, and how much may be skipped before the training gives up.

    A loss or gradient that is not finite, or a gradient `spike` times the median norm of the steps
    before it, is never applied: the training goes back to its last commit and skips those images.
    A second refusal before the next commit skips twice as much, as far back as that commit (the
    harm was done by an update before it, as PaLM's authors found: arXiv 2204.02311, section 5.1).
    Commits by the clock and at a stop bound that as planned ones do: after one of them a second
    refusal can skip less than it would have in an undisturbed training.
    """

    spike: float | None = Field(default=30.0, gt=1)
    attempts: int = Field(default=5, ge=0)  # from one commit to the next
    share: float = Field(default=0.05, ge=0, le=1)  # of all images that may be skipped


class LoraConfig(Config):
    """An expert as low-rank adapters on the base (Hu et al. 2021, arXiv 2106.09685, section 4.1).

    What they add counts alpha / rank. A target is the end of a layer's name, such as `to_q` or
    `ff.net.2`.
    """

    rank: int | None = Field(default=None, ge=1)  # None trains all weights
    alpha: float | None = Field(default=None, gt=0)  # None takes the rank
    targets: tuple[str, ...] | None = Field(default=None, min_length=1)  # None: attention's


class DenoiserTraining(Config):
    """How a base or an expert is trained."""

    batch: int | None = Field(default=None, ge=1)  # None takes the recipe's
    passes: float | None = Field(default=None, gt=0)  # images_seen over records; None: recipe's
    prediction: Prediction | None = None  # None: a base's velocity, of an expert its base's
    # The noise schedule that the network works on. None: our linear path, of an expert its base's.
    schedule: NoiseSchedule | None = None
    # Of a base: where the two above are None, those of the weights that it starts from.
    keep_path: bool = False
    condition_dropout: float = Field(default=0.1, ge=0, le=1)
    # Decays per step, warmed up. Of several, the one of least held-out loss is published.
    ema_decays: tuple[_Decay, ...] = Field(default=(0.995,), min_length=1)
    time: TimeConfig = TimeConfig()
    weight: WeightConfig = WeightConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    guard: GuardConfig = GuardConfig()
    lora: LoraConfig = LoraConfig()  # of experts alone
    accumulation: int = Field(default=1, ge=1)  # parts of a batch that are computed in turn
    precision: Literal["float32", "bfloat16"] = "float32"  # of the network's arithmetic
    gradient_checkpointing: bool = False
    compile: bool = False
    checkpoints: int = Field(default=8, ge=1)  # how many over the whole training
    # And after so long without one, so that a long training is never far from its last commit.
    checkpoint_seconds: float | None = Field(default=600.0, gt=0)

    @property
    def objective(self) -> Prediction:
        """What the network predicts."""
        return self.prediction or Prediction.VELOCITY

    def of(self, card: Card) -> DenoiserTraining:
        """These settings for a denoiser, whose card decides what it predicts and on which path."""
        decided = {"prediction": card.prediction, "schedule": card.schedule}
        return self.model_copy(update=decided)


class ClassifierTraining(Config):
    """How a small classifier is trained beside a denoiser."""

    # Images seen; None takes a share of the denoiser's images_seen, or as many as cost that share
    # of its computations where those are fewer: it stays light beside a small denoiser too.
    images: int | None = Field(default=None, ge=1)
    share: float = Field(default=1.0, gt=0)
    compute: float = Field(default=0.25, gt=0)
    weight_decay: float = Field(default=0.01, ge=0)
    condition_dropout: float = Field(default=0.3, ge=0, le=1)
    checkpoints: int = Field(default=2, ge=1)  # as far apart as a denoiser's 8, at a share of 0.25


class TrunkTraining(ClassifierTraining):
    """How the gate's trunk is trained on the commons' labels."""

    batch: int = Field(default=128, ge=2)
    learning_rate: float = Field(default=2e-3, gt=0)
    width: int = Field(default=32, ge=8, multiple_of=8)


class HeadTraining(ClassifierTraining):
    """How a gate head is trained against the anchor, and calibrated.

    `images` are those of its shard; as many of the anchor are seen besides.
    """

    batch: int = Field(default=64, ge=2)
    learning_rate: float = Field(default=5e-4, gt=0)
    # Share of the anchor that is seeded broad noise instead of commons records, so that a head is
    # defined where the commons never goes.
    broad: float = Field(default=0.25, ge=0, lt=1)
    bands: int = Field(default=5, ge=1)


class BaseConfig(Config):
    """`atoll base`."""

    recipe: str | None = None  # None takes the one for the picture's size, or for the start's
    start: str | None = None  # weights to start from, as `core/starts.py` reads them; None: random
    threads: int = Field(default=1, ge=1)  # part of what makes training bitwise the same
    device: Device = "auto"
    bitwise_resume: bool = True  # false: other hardware or versions may go on, journalled
    cache_gib: float = Field(default=8.0, gt=0)  # of a far run's packs, on this machine's disk
    training: DenoiserTraining = DenoiserTraining()
    trunk: TrunkTraining = TrunkTraining()  # of the gate, on the commons as the base is


class WatchConfig(Config):
    """How the controller watches islands, and what it does then; no island is told."""

    # A job whose signs of life stop for so long is taken over by the next generation.
    dead_seconds: float = Field(default=60.0, gt=0)
    # So is one that lives and takes no step for so long in a training: a device hangs, or a worker.
    stalled_seconds: float = Field(default=3600.0, gt=0)
    # An island that does not answer gets no shard until it does. After so long a head of ours that
    # has ended is started again in its stead; where there is none, shards say what they wait for.
    unreachable_seconds: float = Field(default=60.0, gt=0)
    # And after so long those that no other island takes are given up; None waits for ever.
    give_up_seconds: float | None = Field(default=6 * 3600.0, gt=0)
    # Doubled with every further attempt of a shard, up to 32 times as long.
    backoff_seconds: float = Field(default=1.0, ge=0)
    tracker: Literal["wandb", "trackio"] | None = None  # besides TensorBoard's files


class TrainConfig(Config):
    """`atoll train`."""

    threads: int = Field(default=1, ge=1)
    device: Device = "auto"
    bitwise_resume: bool = True  # false: other hardware or versions may go on, journalled
    workers: int = Field(default=1, ge=1)  # processes that train one shard together
    parallel: Parallel = "ddp"  # of several workers: replicas, or shards of everything (FSDP2)
    cache_gib: float = Field(default=8.0, gt=0)  # of a far run's packs, on each island's disk
    slots: int | None = Field(default=None, ge=1)  # islands at once on the local head
    planned_by_all: bool = False  # whether --minutes was divided by all shards' records
    retries: int = Field(default=3, ge=0)  # new generations of a shard, none of which got further
    spot: Cloud = "auto"  # whose notices that a machine is taken back are heeded
    training: DenoiserTraining = DenoiserTraining()
    head: HeadTraining = HeadTraining()
    preview: int = Field(default=16, ge=0)  # pictures in preview.png
    preview_steps: int = Field(default=20, ge=1)
    # Equal shares of images_seen, with a preview after each; None: 4, or fewer where those on the
    # way would cost over 2% of the expert's own computations.
    preview_milestones: int | None = Field(default=None, ge=1)
    islands: tuple[Island, ...] = ()  # none: one local head
    watch: WatchConfig = WatchConfig()


def check_accumulation(batch: int, accumulation: int) -> None:
    """Refuse parts of a batch that are not whole, by a `ConfigError`."""
    if batch % accumulation:
        raise ConfigError(
            f"A batch of {batch} is not to be had in {accumulation} parts",
            cure="choose training.accumulation so that it divides the batch",
        )


def plan_for(training: DenoiserTraining, recipe: Recipe, records: int, *, base: bool) -> Plan:
    """Batch and images_seen from the number of records alone, so that no other shard matters.

    With K shards of equal size this is DDM's rule (arXiv 2501.05450, section 4): as many steps as
    the monolith with a batch K times as large.
    """
    batch = training.batch or recipe.batch
    passes = training.passes or (recipe.base_passes if base else recipe.passes)
    steps = max(1, math.ceil(records * passes / batch))
    return Plan(batch=batch, images_seen=steps * batch)


def plan_beside(
    training: TrunkTraining | HeadTraining, denoiser: Plan, *, cost: float = 0.0
) -> Plan:
    """Batch and images of a small classifier beside a denoiser with this plan.

    `cost` is what an image costs it, that of the anchor beside it included, in units of what one
    costs the denoiser.
    """
    share = min(training.share, training.compute / cost) if cost > 0 else training.share
    images = training.images or max(_LEAST_IMAGES, round(share * denoiser.images_seen))
    steps = max(1, images // training.batch)
    return Plan(batch=training.batch, images_seen=steps * training.batch)
