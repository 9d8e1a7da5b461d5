"""Sample an ensemble of U-Nets in diffusers' own Stable Diffusion pipeline, guided.

python examples/stock_pipeline.py out/demo/run/ensemble "a handwritten seven"

Needs `pip install 'atoll[pipelines]'`. An ensemble of pixels has no vae: the latents that the
pipeline leaves are the picture.
"""

import sys
from pathlib import Path

from diffusers import StableDiffusionPipeline

from atoll.core.embedding import load_encoder
from atoll.router.model import EnsembleModel
from atoll.router.pipeline import to_pil
from atoll.router.schedulers import FlowEuler

NONE = dict.fromkeys(("vae", "text_encoder", "tokenizer", "safety_checker", "feature_extractor"))


def main(folder: str, prompt: str, out: str = "stock.png") -> None:
    """Write one picture."""
    model = EnsembleModel.from_pretrained(folder, subfolder="transformer")
    model.set_routing("mass:0.9", paired=True)  # both branches of guidance by the same experts
    pipe = StableDiffusionPipeline(
        unet=model, scheduler=FlowEuler(), requires_safety_checker=False, **NONE
    )
    tokens = load_encoder(Path(folder, "text_encoder")).condition([prompt, ""]).tokens
    x_data = pipe(
        prompt_embeds=tokens[:1],
        negative_prompt_embeds=tokens[1:],
        guidance_scale=2.0,
        num_inference_steps=20,
        output_type="latent",
    ).images
    to_pil(x_data)[0].resize((256, 256), 0).save(out)


if __name__ == "__main__":
    main(*sys.argv[1:])
