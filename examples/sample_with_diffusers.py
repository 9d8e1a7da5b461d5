"""Sample an ensemble with nothing but diffusers: one import makes its pipeline known.

python examples/sample_with_diffusers.py out/demo/run/ensemble "a handwritten seven"
"""

import sys

from diffusers import DiffusionPipeline

import atoll.router  # noqa: F401  makes diffusers.AtollPipeline known


def main(folder: str, prompt: str, out: str = "sample.png") -> None:
    """Write one picture."""
    pipeline = DiffusionPipeline.from_pretrained(folder)
    output = pipeline([prompt], routing="once", num_inference_steps=20, seed=7)
    output.images[0].resize((256, 256), 0).save(out)


if __name__ == "__main__":
    main(*sys.argv[1:])
