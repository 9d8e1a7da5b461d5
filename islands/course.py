"""What a training is told besides its data: how far, how fast, and what may go wrong."""

from __future__ import annotations

from dataclasses import dataclass, field

from atoll.core.manifest import Plan
from atoll.islands.settings import GuardConfig, LoraConfig


@dataclass(frozen=True)
class Course:
    """How one training runs: the plan and what the optimiser is told."""

    plan: Plan
    learning_rate: float
    weight_decay: float
    betas: tuple[float, float]
    warmup: float
    clip: float
    ema_decays: tuple[float, ...]
    checkpoints: int
    checkpoint_seconds: float | None = None
    guard: GuardConfig = field(default_factory=GuardConfig)
    lora: LoraConfig = field(default_factory=LoraConfig)
    accumulation: int = 1
    kernel: str = "fused"
    bitwise_resume: bool = True  # else a resume on other hardware or versions is only journalled
