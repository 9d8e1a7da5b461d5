"""Do prompted pictures show what was asked for? A one-nearest-neighbour reader over real records.

Cover and Hart (1967), in pixel space, against held-out records that no training used. The reader's
own leave-one-out accuracy stands beside its verdict: no sample can be read better than that.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from pydantic import BaseModel, ConfigDict
from torch import Tensor

from atoll.evaluate.features import pixels
from atoll.evaluate.metrics import Estimate, proportion


class Reading(BaseModel):
    """How many of a system's pictures were read as the label that was asked for."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    accuracy: Estimate
    by_label: dict[str, tuple[int, int]]  # label -> (read as it, asked for)


class Reader:
    """Real pictures `(m, channel, height, width)` with their labels."""

    def __init__(self, pictures: Tensor, labels: Sequence[str]) -> None:
        self._features = pixels(pictures)
        self._labels = tuple(labels)
        if len(self._features) != len(self._labels) or len(self._labels) < 2:
            raise ValueError(
                f"{len(self._features)} pictures and {len(self._labels)} labels; "
                "allowed: one label a picture, two or more; cure: leave out unlabelled records"
            )

    def read_labels(self, pictures: Tensor) -> list[str]:
        """The label of the nearest real picture, for each picture."""
        nearest = torch.cdist(pixels(pictures), self._features).argmin(dim=1)
        return [self._labels[index] for index in nearest.tolist()]

    def own_accuracy(self) -> Estimate:
        """Leave-one-out accuracy on the real pictures themselves."""
        distance = torch.cdist(self._features, self._features).fill_diagonal_(torch.inf)
        read = [self._labels[index] for index in distance.argmin(dim=1).tolist()]
        right = sum(a == b for a, b in zip(read, self._labels, strict=True))
        return proportion(right, len(read))

    def reading(self, pictures: Tensor, asked: Sequence[str]) -> Reading:
        """Compare what is read in `pictures` with what was asked for."""
        read = self.read_labels(pictures)
        right = [a == b for a, b in zip(read, asked, strict=True)]
        by_label: dict[str, tuple[int, int]] = {}
        for label, is_right in sorted(zip(asked, right, strict=True)):
            hits, total = by_label.get(label, (0, 0))
            by_label[label] = (hits + is_right, total + 1)
        return Reading(accuracy=proportion(sum(right), len(right)), by_label=by_label)
