"""What a training is told besides its data: how far, how fast, and what may go wrong."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

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
    loss: Mapping[str, Any] = field(default_factory=dict)  # what the loss was told, as JSON
    origin: Mapping[str, Any] = field(default_factory=dict)  # what the weights come from, as JSON
    bitwise_resume: bool = True  # else a resume on other hardware or versions is only journalled

    def settings(self) -> dict[str, Any]:
        """What decides the bits besides the plan, the averages and the adapters, as JSON.

        Not how often it commits: that alters none.
        """
        return {
            **self.loss,
            "learning_rate": self.learning_rate,
            "weight_decay": self.weight_decay,
            "betas": list(self.betas),
            "warmup": self.warmup,
            "clip": self.clip,
            **{f"guard.{key}": value for key, value in self.guard.model_dump().items()},
            "accumulation": self.accumulation,
            "kernel": self.kernel,
        }
