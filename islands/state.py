"""What a training carries from step to step, and how that is committed, found and restored."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from atoll.core.checkpoint import Checkpoint, Checkpoints
from atoll.core.errors import Refused
from atoll.islands.background import Background
from atoll.islands.compute import device_name
from atoll.islands.course import Course
from atoll.islands.ema import Averages
from atoll.islands.guard import Guard
from atoll.islands.learner import Learner
from atoll.islands.metrics import Means

# Facts of a checkpoint that go on with a training, and need not be the same for it to go on.
_CARRIED = ("means", "guard")
# And those without which it is another training.
_THE_TRAINING = ("origin", "plan", "lora", "ema_decays")
# And those that are the island's: hardware, workers, threads and versions.
_THE_ISLAND = (
    "workers", "parallel", "threads", "torch", "cuda", "numpy", "diffusers", "device",
)  # fmt: skip

Differing = dict[str, list[Any]]
"""Facts that are not the same, by dotted name: then and now."""


class NotBitwise(Refused):
    """A resume that is refused for hardware, workers, threads or versions that differ, and only so.

    Elsewhere it may go on. `differing` is what is not the same here.
    """

    def __init__(self, what: str, *, differing: Differing | None = None, cure: str = "") -> None:
        # Optional: Ray copies what a worker raised by its first argument and its fields.
        super().__init__(what, cure=cure)
        self.differing = differing or {}


def made_with(facts: Mapping[str, Any]) -> dict[str, Any]:
    """Of a checkpoint's facts those that are another island's to fulfil."""
    return {key: facts[key] for key in _THE_ISLAND if key in facts}


def differing(then: Mapping[str, Any], now: Mapping[str, Any]) -> Differing:
    """The facts that are not the same; what one of the two does not have is None there."""
    found: Differing = {}
    for key in sorted({*then, *now}):
        was, ours = then.get(key), now.get(key)
        if isinstance(was, dict) and isinstance(ours, dict):
            found |= {f"{key}.{name}": pair for name, pair in differing(was, ours).items()}
        elif was != ours:
            found[key] = [was, ours]
    return found


def in_words(found: Differing) -> str:
    """Each fact with then and now."""
    return ", ".join(f"{name} {then} then and {now} now" for name, (then, now) in found.items())


class TrainingState:
    """Weights, averages, optimiser, guard and means; of several ranks, this one's.

    Its commits lie where `checkpoints` keeps them. Replicas are the same, so that the first one's
    is the state; of shards each writes its own part, and all are sealed as one.
    """

    def __init__(
        self, learner: Learner, course: Course, checkpoints: Checkpoints, name: str
    ) -> None:
        self._learner = learner
        self._course = course
        self._checkpoints = checkpoints
        self._name = name
        self.averages = Averages(learner.parameters, course.ema_decays)
        self.optimizer = torch.optim.AdamW(
            learner.parameters,
            lr=course.learning_rate,
            betas=course.betas,
            weight_decay=course.weight_decay,
            fused=course.kernel == "fused",
            foreach=course.kernel == "foreach",
        )
        self.guard = Guard(course.guard, course.plan, name)
        self.means = Means(learner.group)

    def commit(self, seen: int, background: Background) -> None:
        """Copy the state and hand it on; what is queued there before it comes first."""
        group, piece, checkpoints = self._learner.group, self._learner.piece, self._checkpoints
        # By every rank: means are summed over all of them.
        facts = {**self.facts(), "means": self.means.state(), "guard": self.guard.state()}
        if not group.leads and piece.count == 1:
            return
        tensors = {
            name: value.detach().to("cpu", copy=True) for name, value in self._tensors().items()
        }
        files: list[dict[str, Any]] = []  # of all ranks; kept where sealing is tried again

        def work() -> None:
            if not files:
                own = checkpoints.write(seen, tensors, piece)
                files.extend([own] if piece.count == 1 else group.gather_files(own))
            if group.leads:
                checkpoints.seal(seen, files, facts)

        background.submit("a checkpoint", work)

    def latest(self) -> Checkpoint | None:
        """The newest state that verifies on every rank, of those that the first one sees."""
        group = self._learner.group
        return self._checkpoints.latest(
            self._learner.piece,
            names=group.gather(self._checkpoints.names())[0],
            agreed=lambda found: not group.any(not found)[0],
        )

    def otherwise(self, checkpoint: Checkpoint) -> dict[str, Any] | None:
        """What it was made with where a resume would not be bitwise; None where it would be.

        Raises `Refused` where it is of another training, or the course allows no such resume:
        `NotBitwise` if it might elsewhere.
        """
        was = {key: value for key, value in checkpoint.facts.items() if key not in _CARRIED}
        found = differing(was, self.facts())
        if not found:
            return None
        said = f"The checkpoint of {self._name} was made otherwise: {in_words(found)}"
        if any(name.partition(".")[0] in _THE_TRAINING for name in found):
            raise Refused(
                said, cure="use the same start, plan, averages and adapters, or start a new run"
            )
        inexact = "--allow-inexact-resume goes on, and the result is not bitwise what it would be"
        if self._course.bitwise_resume and found.keys() <= {*_THE_ISLAND}:
            raise NotBitwise(
                said,
                differing=found,
                cure=f"use the same hardware, workers, threads and versions; or {inexact}",
            )
        if self._course.bitwise_resume:
            raise Refused(said, cure=f"use the same settings; or {inexact}")
        return was

    def restore(self, checkpoint: Checkpoint, *, keep_ranges: bool = False) -> None:
        """Put a state back; `keep_ranges` where a training goes back and has learnt what to skip.

        These ranges are in the next commit. Killed before it, a training meets the batch again.
        """
        tensors, names = checkpoint.tensors, self._learner.names
        self.averages.restore(names, tensors)
        with torch.no_grad():
            for name, parameter in zip(names, self._learner.parameters, strict=True):
                parameter.copy_(tensors[f"weights/{name}"])
                # Before the first step there is none.
                if f"optimizer/step/{name}" in tensors:
                    self.optimizer.state[parameter] = {
                        key: tensors[f"optimizer/{key}/{name}"].to(parameter.device, copy=True)
                        for key in ("step", "exp_avg", "exp_avg_sq")
                    }
                else:
                    self.optimizer.state.pop(parameter, None)
        self.means = Means(self._learner.group, checkpoint.facts["means"])
        self.guard.restore(checkpoint.facts["guard"], keep_ranges=keep_ranges)

    def facts(self) -> dict[str, Any]:
        """What must be the same for a resume to be bitwise."""
        lora, device = self._course.lora, self._learner.parameters[0].device
        import diffusers  # takes seconds, and who starts islands imports this file

        adapters = {} if lora.rank is None else {"lora": lora.model_dump(mode="json")}
        return {
            **adapters,
            **self._course.settings(),
            "origin": dict(self._course.origin),
            "plan": self._course.plan.model_dump(),
            "ema_decays": list(self._course.ema_decays),
            "workers": self._learner.group.world,
            "parallel": self._learner.parallel,
            "threads": torch.get_num_threads(),
            "torch": torch.__version__,
            "cuda": torch.version.cuda if device.type == "cuda" else None,
            "numpy": np.__version__,  # the order of records is its permutation
            "diffusers": diffusers.__version__,
            "device": device_name(device),
        }

    def _tensors(self) -> dict[str, Tensor]:
        names = self._learner.names
        tensors = self.averages.tensors(names)
        for name, parameter in zip(names, self._learner.parameters, strict=True):
            tensors[f"weights/{name}"] = parameter
            for key, value in self.optimizer.state[parameter].items():
                tensors[f"optimizer/{key}/{name}"] = value
        return tensors
