"""Give a shard another expert: of any family, size, prediction and noise schedule.

python examples/mix_experts.py out/demo/run/ensemble out/other/islands/shard-01/expert out/mixed

The expert's card says which shard it is of. The gate stays: it knows shards, not networks. Both
runs must be of one partition, so that the shard, the encoder and the latents are the same.
"""

import sys
from pathlib import Path

from diffusers import DiffusionPipeline

import atoll.router  # noqa: F401  makes diffusers.AtollPipeline known
from atoll.core.denoiser import Denoiser
from atoll.router.model import EnsembleModel


def main(ensemble: str, expert: str, out: str) -> None:
    """Write the ensemble with the expert in the place of its shard's own."""
    pipeline = DiffusionPipeline.from_pretrained(ensemble)
    own = pipeline.transformer
    other = Denoiser.load(Path(expert))
    experts = [
        other
        if shard == other.card.shard
        else Denoiser.load(Path(ensemble, "transformer/experts", shard))
        for shard in own.shards
    ]
    if other not in experts:
        sys.exit(f"{expert} is of {other.card.shard}; the ensemble has {', '.join(own.shards)}")
    mixed = EnsembleModel(own.ensemble_config, experts, own.gate, own.text_projection)
    pipeline.register_modules(transformer=mixed)
    pipeline.save_pretrained(out)


if __name__ == "__main__":
    main(*sys.argv[1:])
