"""The ensemble in diffusers' own pipelines, held against `AtollPipeline`."""

from __future__ import annotations

import runpy
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler
from PIL import Image
from torch import Tensor

from atoll.core import sampler
from atoll.core.digest import sha256_folder
from atoll.core.embedding import Encoder, load_encoder, text_projection
from atoll.core.errors import UsageError
from atoll.core.manifest import Manifest
from atoll.core.storage import Storage
from atoll.router.assemble import assemble
from atoll.router.chooser import sample_settings, x_noise
from atoll.router.model import EnsembleModel
from atoll.router.pipeline import AtollPipeline
from atoll.router.schedulers import FlowDPMSolver, FlowEuler, FlowHeun, FlowUniPC
from tests.router.conftest import PICTURE
from tests.router.experts import of_families

# diffusers has none of these classes without it; `pip install 'atoll[pipelines]'`.
pytest.importorskip("transformers")

PROMPTS = ["a grey square", "a bright dot", "something never seen"]
FLOW = {"use_flow_sigmas": True, "prediction_type": "flow_prediction"}
SCHEDULERS = {
    "Euler": FlowEuler,
    "Heun": FlowHeun,
    "DPM-Solver++": lambda: FlowDPMSolver(**FLOW),
    "UniPC": lambda: FlowUniPC(**FLOW),
}
TAKES_SIGMAS = ("Euler", "UniPC")
KINDS = ("StableDiffusion", "PixArtAlpha", "PixArtSigma", "StableDiffusion3")
STEPS = 4


@pytest.fixture(scope="module")
def folder(trained: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("assembled") / "run"
    shutil.copytree(trained, place)
    assemble(Storage(place), Manifest.load(Storage(place)))
    return place / "ensemble"


@pytest.fixture(scope="module")
def encoder(folder: Path) -> Encoder:
    return load_encoder(folder / "text_encoder")


@pytest.fixture(scope="module", params=KINDS)
def kind(request: Any) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def model(kind: str, folder: Path) -> EnsembleModel:
    """Of the pipeline's family, and with experts of another beside them."""
    if kind == "StableDiffusion3":
        projection = text_projection(folder / "text_encoder")
        return of_families("sd3", "unet", "sd3", projection=projection)
    family = "unet" if kind == "StableDiffusion" else "pixart"
    return EnsembleModel.from_pretrained(folder, subfolder="transformer", family=family)


def absent(kind: str) -> dict[str, Any]:
    """The parts that a stock pipeline is told it has not; `from_pretrained` is told them too."""
    if kind == "StableDiffusion":
        more = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
    elif kind == "StableDiffusion3":
        more = dict.fromkeys(("text_encoder_2", "tokenizer_2", "text_encoder_3", "tokenizer_3"))
    else:
        more = {}
    return {"vae": None, "text_encoder": None, "tokenizer": None, **more}


def stock(kind: str, model: EnsembleModel, scheduler: Any) -> Any:
    """A stock pipeline of nothing but the ensemble and a scheduler."""
    import diffusers

    parts = {"unet" if kind == "StableDiffusion" else "transformer": model, **absent(kind)}
    pipe = getattr(diffusers, f"{kind}Pipeline")(scheduler=scheduler, **parts)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def sampled(kind: str, pipe: Any, encoder: Encoder, **options: Any) -> Tensor:
    cond, null = encoder.condition(PROMPTS), encoder.condition([""]).expand(len(PROMPTS))
    given: dict[str, Any] = {
        "prompt_embeds": cond.tokens, "negative_prompt_embeds": null.tokens,
        "num_inference_steps": STEPS, "output_type": "latent", "guidance_scale": 1.0,
    }  # fmt: skip
    if kind.startswith("PixArt"):
        given |= {"prompt_attention_mask": cond.mask, "use_resolution_binning": False}
        given |= {"negative_prompt_attention_mask": null.mask, "negative_prompt": None}
    if kind == "StableDiffusion3":
        given |= {"pooled_prompt_embeds": cond.pooled}
        given |= {"negative_pooled_prompt_embeds": null.pooled}
    made: Tensor = pipe(**{**given, **options}).images
    return made


def latents() -> Tensor:
    return x_noise(sample_settings(len(PROMPTS), ["any"], seed=6), PICTURE.shape)


def grid(name: str) -> dict[str, Any]:
    """The times of `AtollPipeline`, for schedulers that take any."""
    if name not in TAKES_SIGMAS:
        return {}
    return {"num_inference_steps": None, "sigmas": sampler.times(STEPS)[:-1].tolist()}


@pytest.mark.parametrize("name", SCHEDULERS)
@pytest.mark.parametrize("guidance", [1.0, 2.5])
def test_it_makes_the_pictures_of_our_pipeline(
    kind: str, model: EnsembleModel, encoder: Encoder, name: str, guidance: float
) -> None:
    """The same noise, solver, routing and guidance: the same pictures."""
    ours = AtollPipeline(model, SCHEDULERS[name](), encoder)
    pipe = stock(kind, model, SCHEDULERS[name]())
    for routing in ("full", "top-k:1"):
        expected = ours(
            PROMPTS, routing=routing, guidance_scale=guidance, num_inference_steps=STEPS, seed=6,
            output_type="latent",
        ).images  # fmt: skip
        model.set_routing(routing, paired=guidance > 1)
        made = sampled(
            kind, pipe, encoder, guidance_scale=guidance, latents=latents(), **grid(name)
        )
        torch.testing.assert_close(made, expected, rtol=2e-4, atol=2e-4)


@pytest.mark.parametrize("guidance", [1.0, 2.5])
def test_once_by_drawn_experts(
    kind: str, model: EnsembleModel, encoder: Encoder, guidance: float
) -> None:
    ours = AtollPipeline(model, FlowMatchEulerDiscreteScheduler(), encoder)
    expected = ours(
        PROMPTS, routing="once", guidance_scale=guidance, num_inference_steps=STEPS, seed=6,
        output_type="latent",
    ).images  # fmt: skip
    drawn = model.draw(encoder.condition(PROMPTS), seed=6)
    model.set_routing("once", experts=drawn, paired=guidance > 1)
    pipe = stock(kind, model, FlowEuler())
    made = sampled(kind, pipe, encoder, guidance_scale=guidance, latents=latents(), **grid("Euler"))
    torch.testing.assert_close(made, expected, rtol=2e-4, atol=2e-4)


def test_generators_and_pictures_a_prompt(
    kind: str, model: EnsembleModel, encoder: Encoder
) -> None:
    model.set_routing("full")
    pipe = stock(kind, model, FlowEuler())

    def made(seed: int, **options: Any) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        return sampled(kind, pipe, encoder, generator=generator, **options)

    assert torch.equal(made(1), made(1))
    assert not torch.equal(made(1), made(2))
    if kind == "StableDiffusion3":
        # It repeats prompts, and not embeddings that it is given.
        with pytest.raises(UsageError, match="num_images_per_prompt"):
            made(1, num_images_per_prompt=2)
    else:
        assert len(made(1, num_images_per_prompt=2, guidance_scale=2.0)) == 2 * len(PROMPTS)


def test_callbacks(kind: str, model: EnsembleModel, encoder: Encoder) -> None:
    model.set_routing("full")
    pipe = stock(kind, model, FlowEuler())
    told: list[int] = []
    if kind.startswith("PixArt"):
        sampled(kind, pipe, encoder, callback=lambda step, _t, _x: told.append(step))
    else:

        def stop(of: Any, step: int, _t: Tensor, given: dict[str, Any]) -> dict[str, Any]:
            told.append(step)
            of._interrupt = step == 1
            return {"latents": torch.zeros_like(given["latents"])} if step == 1 else {}

        made = sampled(kind, pipe, encoder, callback_on_step_end=stop)
        assert not bool(made.any()), "the pipeline was stopped after the second step"
        del told[2:]
        told += [2, 3]
    assert told == [0, 1, 2, 3]


def test_a_pipeline_is_saved_and_loaded(
    kind: str, model: EnsembleModel, encoder: Encoder, folder: Path, tmp_path: Path
) -> None:
    """The ensemble byte for byte, the pictures bit for bit, and its adapter with it."""
    model.set_routing("full")
    pipe = stock(kind, model, FlowHeun())
    pipe.save_pretrained(tmp_path)
    again = type(pipe).from_pretrained(tmp_path, **absent(kind))
    part = "unet" if kind == "StableDiffusion" else "transformer"
    assert type(again.scheduler) is FlowHeun
    assert type(getattr(again, part)) is EnsembleModel
    assert getattr(again, part).family == model.family
    expected = sampled(kind, pipe, encoder, latents=latents())
    assert torch.equal(sampled(kind, again, encoder, latents=latents()), expected)
    if kind == "StableDiffusion":
        assert sha256_folder(tmp_path / part) == sha256_folder(folder / "transformer")


def test_latents_are_decoded_by_the_pipeline(folder: Path, encoder: Encoder) -> None:
    """Of an ensemble of latents, with whose autoencoder a stock pipeline makes pictures."""
    model = EnsembleModel.from_pretrained(folder, subfolder="transformer")
    vae = AutoencoderKL(
        in_channels=1, out_channels=1, latent_channels=1, block_out_channels=(8, 8),
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
        norm_num_groups=4, scaling_factor=0.5,
    )  # fmt: skip
    pipe = stock("StableDiffusion", model, FlowEuler())
    pipe.register_modules(vae=vae)
    pipe.vae_scale_factor = 2
    made = sampled("StableDiffusion", pipe, encoder, output_type="np", generator=None)
    assert isinstance(made, np.ndarray)
    assert made.shape == (3, 16, 16, 1)


@pytest.mark.parametrize("dtype", [torch.bfloat16])
def test_16_bits(folder: Path, encoder: Encoder, dtype: torch.dtype) -> None:
    exact = EnsembleModel.from_pretrained(folder, subfolder="transformer")
    model = EnsembleModel.from_pretrained(folder, subfolder="transformer", torch_dtype=dtype)
    made = [
        sampled("StableDiffusion", stock("StableDiffusion", m, FlowEuler()), encoder,
                latents=latents())
        for m in (model, exact)
    ]  # fmt: skip
    assert float((made[0].float() - made[1]).norm() / made[1].norm()) < 0.05


def test_the_example(folder: Path, tmp_path: Path) -> None:
    example = runpy.run_path(str(Path(__file__).parents[2] / "examples" / "stock_pipeline.py"))
    example["main"](str(folder), "a bright dot", str(tmp_path / "made.png"))
    with Image.open(tmp_path / "made.png") as image:
        assert image.size == (256, 256)
