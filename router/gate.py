"""The gate: the posterior over shards, assembled from independently trained heads.

p(k | x_t, t, cond) is proportional to n_k exp f_k(x_t, t, cond), with n_k the shard's record count
and f_k its head's log density ratio to the one anchor. The anchor cancels, so adding or removing a
shard is adding or removing its head, and nothing is retrained. What all heads share, the public
trunk, runs once for all of them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from atoll.core.conditioning import Conditioning
from atoll.core.head import GateHead, HeadConfig
from atoll.core.trunk import Trunk


class GateWeights(Protocol):
    """Anything that gives `(batch, shard)` weights summing to 1: heads, or a closed form."""

    def __call__(self, x_t: Tensor, t: Tensor, cond: Conditioning) -> Tensor: ...


class InFloat32(nn.Module):
    """Moves to another device as any module, but keeps its dtype: 16 bits are no odds."""

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        def moved(tensor: Tensor) -> Tensor:
            return tensor.to(fn(tensor.new_empty(0)).device)

        return super()._apply(moved, recurse)  # type: ignore[no-untyped-call]


class Gate(InFloat32):
    """The trunk, gate heads and record counts, in the order of the ensemble's experts.

    The base has None for a head and f = 0, as if the anchor were its records alone: it answers
    where every shard's density is far below the anchor's. Of an anchor with a share b of broad
    noise it has at least 1 - b of its exact odds, that where such noise is told from pictures.
    """

    def __init__(
        self, trunk: Trunk, heads: Mapping[str, GateHead | None], records: Mapping[str, int]
    ) -> None:
        super().__init__()
        self.trunk = trunk
        self.shards = list(heads)
        self.heads = nn.ModuleDict(
            {str(k): h for k, h in enumerate(heads.values()) if h is not None}
        )
        # Integer counts, so that a removal changes the others' priors exactly.
        self.records = {shard: records[shard] for shard in self.shards}

    @property
    def pooled(self) -> int:
        """The dimension of the pooled caption that it reads."""
        return self.trunk.config.pooled

    @property
    def configs(self) -> dict[str, HeadConfig]:
        """Every head's configuration, its calibration among it, by shard."""
        return {shard: head.config for shard, head in self.by_shard().items()}

    def by_shard(self) -> dict[str, GateHead]:
        """The head of every expert but the base."""
        found = {}
        for k, head in self.heads.items():
            assert isinstance(head, GateHead)
            found[self.shards[int(k)]] = head
        return found

    def log_weights(self, x_t: Tensor, t: Tensor, cond: Conditioning) -> Tensor:
        """log p(k | x_t, t, cond), `(batch, expert)`."""
        weight = next(self.trunk.parameters())
        x_t, t, cond = x_t.to(weight), t.to(weight), cond.to(weight)
        counts = torch.tensor([float(self.records[shard]) for shard in self.shards])
        features = self.trunk.features(x_t, t, cond)
        ratios = x_t.new_zeros(len(x_t), len(self.shards))
        for k, head in self.heads.items():
            ratios[:, int(k)] = head(features, t, cond)
        return (ratios + counts.log().to(ratios)).log_softmax(dim=1)

    def forward(self, x_t: Tensor, t: Tensor, cond: Conditioning) -> Tensor:
        """gate_weights, `(batch, shard)`, each row summing to 1."""
        return self.log_weights(x_t, t, cond).exp()


class JointGate(InFloat32):
    """One classifier that was trained on the records of all shards (DDM, section 3.3).

    Of shards that left, or are missing, the others are renormalised: it is the exact law over them
    if the classifier is exact.
    """

    def __init__(self, classifier: Trunk, records: Mapping[str, int]) -> None:
        super().__init__()
        self.classifier = classifier
        self.records = dict(records)
        labels = list(classifier.config.labels)
        self._columns = [labels.index(shard) for shard in records]

    @property
    def pooled(self) -> int:
        """The dimension of the pooled caption that it reads."""
        return self.classifier.config.pooled

    def forward(self, x_t: Tensor, t: Tensor, cond: Conditioning) -> Tensor:
        """gate_weights, `(batch, shard)`, each row summing to 1."""
        weight = next(self.classifier.parameters())
        x_t, t, cond = x_t.to(weight), t.to(weight), cond.to(weight)
        counts = torch.tensor([float(count) for count in self.records.values()]).log().to(weight)
        text = self.classifier.text_logits(cond)[:, self._columns]
        at_noise = torch.where(cond.is_null[:, None], counts, text)
        seen = self.classifier.logits(x_t, t, cond)[:, self._columns]
        return torch.where((t >= 1)[:, None], at_noise, seen).softmax(dim=1)
