"""Experts and gate heads in, pictures out: the ensemble as a diffusers pipeline.

Open `ensemble.py` first: it is the whole algorithm. Importing this package sets
`diffusers.AtollPipeline`, because diffusers finds a pipeline's class only as its own attribute.
"""

import atoll.router.pipeline as pipeline

__all__ = ["pipeline"]
