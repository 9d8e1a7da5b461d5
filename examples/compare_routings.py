"""One prompt under every routing, from the same noise, in one batch: pictures, and what was run.

python examples/compare_routings.py out/demo/run/ensemble "a handwritten seven" routings.png
"""

import sys
from pathlib import Path

from diffusers import DiffusionPipeline

import atoll.router  # noqa: F401  (sets the class that diffusers looks for)
from atoll.router.trace import strip_png

ROUTINGS = (
    "full", "once", "full>0.5,once", "sample:2", "mass:0.9", "threshold:0.05", "top-k:1",
)  # fmt: skip


def main(ensemble: str, prompt: str, out: str) -> None:
    """Sample and draw; of latents the strip shows their first three channels."""
    pipeline = DiffusionPipeline.from_pretrained(ensemble)
    made = pipeline(
        [prompt] * len(ROUTINGS), routing=ROUTINGS, seed=[0] * len(ROUTINGS), trace=True
    )
    shards = pipeline.transformer.shards
    titles = [f"{prompt or 'no prompt'}, {routing}" for routing in ROUTINGS]
    Path(out).write_bytes(strip_png(made.trace, shards, titles, lambda x_data: x_data[:, :3]))


if __name__ == "__main__":
    main(*sys.argv[1:])
