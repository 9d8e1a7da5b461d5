"""`AtollPipeline`: prompts to pictures through an ensemble, in diffusers' own terms.

    import atoll.router
    from diffusers import DiffusionPipeline
    pictures = DiffusionPipeline.from_pretrained("RUN/ensemble")(["a handwritten seven"]).images

Importing this module sets `diffusers.AtollPipeline`, where diffusers looks for the class.
"""

from __future__ import annotations

import copy
import inspect
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import diffusers
import numpy as np
import torch
from diffusers import AutoencoderKL, DiffusionPipeline, SchedulerMixin
from diffusers.utils import BaseOutput
from PIL import Image
from torch import Tensor

from atoll.core import seeds
from atoll.core.digest import canonical_json
from atoll.core.embedding import Encoder
from atoll.core.errors import Refused, UsageError
from atoll.core.latents import Autoencoder
from atoll.core.manifest import PIXELS, Picture
from atoll.router.chooser import SampleSettings, sample_settings, x_noise
from atoll.router.ensemble import TraceStep
from atoll.router.model import EnsembleModel
from atoll.router.schedulers import set_times

CARD_NAME = "atoll.json"
StepEnd = Callable[[Any, int, Tensor, dict[str, Any]], dict[str, Any]]
"""diffusers' `callback_on_step_end`: (pipeline, step, timestep, {"latents": x_t}) -> changes."""


@dataclass
class AtollOutput(BaseOutput):  # type: ignore[misc]
    """What the pipeline returns.

    `images` are PIL pictures, or `(batch, channel, height, width)` in about [-1, 1] for
    `output_type="pt"`, or for "latent" x_data as the experts left it;
    `trace` holds a step's gate weights and experts, where it was asked for.
    """

    images: list[Image.Image] | Tensor
    trace: list[TraceStep] | None = None


class AtollPipeline(DiffusionPipeline):  # type: ignore[misc]
    """Samples an ensemble under any routing, unguided unless told otherwise.

    One of latents has a `vae`, which makes pictures of them. `scheduler` is a flow scheduler of
    diffusers: FlowMatch Euler or Heun, DPM-Solver++ or UniPC.
    """

    _callback_tensor_inputs: ClassVar[list[str]] = ["latents"]
    _optional_components: ClassVar[list[str]] = ["vae"]
    model_cpu_offload_seq: ClassVar[str] = "text_encoder->transformer->vae"

    def __init__(
        self,
        transformer: EnsembleModel,
        scheduler: SchedulerMixin,
        text_encoder: Encoder,
        vae: AutoencoderKL | None = None,
    ) -> None:
        super().__init__()
        if (vae is None) != (transformer.latent_space == PIXELS):
            raise Refused(
                f"The experts work in {transformer.latent_space}, and there is "
                f"{'no' if vae is None else 'a'} vae",
                cure="load the whole folder that `atoll assemble` wrote",
            )
        self.register_modules(
            transformer=transformer, scheduler=scheduler, text_encoder=text_encoder, vae=vae
        )

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | Sequence[str] = "",
        *,
        latents: Tensor | None = None,
        generator: None = None,
        return_dict: bool = True,
        height: int | None = None,
        width: int | None = None,
        num_inference_steps: int = 30,
        guidance_scale: float | Sequence[float] = 1.0,
        routing: str | Sequence[str] = "full",
        num_images_per_prompt: int = 1,
        seed: int | Sequence[int] = 0,
        first: int = 0,
        one_posterior: bool = False,
        output_type: str = "pil",
        trace: bool = False,
        callback_on_step_end: StepEnd | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
    ) -> AtollOutput | tuple[Any, ...]:
        """Pictures for each prompt in turn; picture number i has the noise of (seed, first + i).

        Or that of `latents`, x_data's shape for each picture. There is no `generator`: a picture's
        noise and draws are its seed's, whatever is sampled beside it.

        `height` and `width` are in pixels, the main shape's by default; of a shape that no expert
        was trained on pictures are made as well, and look it. `routing` is as `parse_routing`
        reads it; `guidance_scale` 1 runs no null branch. Both, and `seed`, may be one for each
        picture; with a seed of its own a picture is number `first` of that seed, as it would be
        alone. `one_posterior` is as of `Trajectory`. A scheduler of two evaluations a step is
        followed by trace and callback at each, and draws once. A callback that sets
        `pipe._interrupt` ends it there.
        """
        if output_type not in ("pil", "pt", "latent"):
            raise UsageError(f"output_type is '{output_type}'", allowed="pil, pt, latent")
        if unknown := set(callback_on_step_end_tensor_inputs) - set(self._callback_tensor_inputs):
            raise UsageError(f"A callback asks for {sorted(unknown)}", allowed="latents")
        if generator is not None:
            raise UsageError("Noise is drawn by seed and number here", cure="seed=7 for generator")
        prompts = _prompts(prompt)
        prompts = [text for text in prompts for _ in range(num_images_per_prompt)]
        if not prompts:
            raise UsageError("No picture is asked for", allowed="one prompt or more, '' among them")
        encoder: Encoder = self.text_encoder
        model: EnsembleModel = self.transformer
        device = self._execution_device
        self._interrupt = False
        picture = self._picture(height, width)
        settings = sample_settings(
            len(prompts),
            model.shards,
            routing=routing,
            guidance=guidance_scale,
            seed=seed,
            first=first,
        )
        _onload(encoder)
        cond, null = encoder.condition(prompts), encoder.condition([""])
        _onload(model)
        trajectory = model.trajectory(
            cond,
            null,
            settings,
            one_posterior=one_posterior,
            trace=trace,
        )
        if latents is None:
            latents = x_noise(settings, picture.shape)
        elif latents.shape != (len(prompts), *picture.shape):
            raise UsageError(
                f"latents are {tuple(latents.shape)}", allowed=f"{(len(prompts), *picture.shape)}"
            )
        # The path and the gate in float32 at least; experts run in their own dtype.
        x_t = latents.to(device, torch.promote_types(latents.dtype, torch.float32))
        # A scheduler keeps its place in itself; a copy lets requests run beside one another.
        scheduler = copy.deepcopy(self.scheduler)
        set_times(scheduler, num_inference_steps, device)
        noise = _own_noise(scheduler, settings)
        for i, timestep in enumerate(scheduler.timesteps):
            # Not the timestep, which multistep schedulers round.
            t = scheduler.sigmas[i].expand(len(x_t)).to(x_t)
            velocity = trajectory(x_t, t, i // scheduler.order)
            x_t = scheduler.step(velocity, timestep, x_t, return_dict=False, **noise)[0]
            if callback_on_step_end is not None:
                told = dict.fromkeys(callback_on_step_end_tensor_inputs, x_t)
                changes = callback_on_step_end(self, i, timestep, told) or {}
                x_t = changes.pop("latents", x_t)
            if self._interrupt:
                break
        if self.vae is not None and output_type != "latent":
            _onload(self.vae)
            x_t = Autoencoder(self.vae).decode(x_t)
        self.maybe_free_model_hooks()
        images = to_pil(x_t) if output_type == "pil" else x_t
        made = AtollOutput(images=images, trace=trajectory.trace)
        return made if return_dict else made.to_tuple()

    def _picture(self, height: int | None, width: int | None) -> Picture:
        """The shape of x_data for pictures of some pixels; refused where there is none."""
        model: EnsembleModel = self.transformer
        main = model.ensemble_config.picture
        if height is None and width is None:
            return main
        factor = 1 if self.vae is None else Autoencoder(self.vae).factor
        sides = [
            main.height * factor if height is None else height,
            main.width * factor if width is None else width,
        ]
        if min(sides) < 1 or any(side % factor for side in sides):
            raise UsageError(
                f"Pictures of {sides[0]}x{sides[1]} are asked for",
                allowed=f"height and width that are multiples of {factor}",
            )
        picture = Picture(
            channels=main.channels, height=sides[0] // factor, width=sides[1] // factor
        )
        model.check_takes(picture)
        return picture

    def save_pretrained(self, save_directory: str | Path, **options: Any) -> None:
        """Write the folder that `from_pretrained` reads, `atoll.json` included.

        A loaded ensemble is written back byte for byte, if it is in the dtype of its files.
        """
        super().save_pretrained(save_directory, **options)
        folder = Path(save_directory)
        parts = ["model_index.json", "text_encoder/config.json"]
        for name in [*parts, *(["vae/config.json"] if self.vae is not None else [])]:
            _forget_place(folder / name)
        config = self.transformer.ensemble_config
        (folder / CARD_NAME).write_bytes(
            canonical_json(ensemble_card(list(config.records), config.missing))
        )


def _prompts(prompt: str | Sequence[str]) -> list[str]:
    prompts = [prompt] if isinstance(prompt, str) else list(prompt or [])
    if not all(isinstance(each, str) for each in prompts):
        raise UsageError(f"The prompt is {prompt!r}", allowed="a text, or several in a list")
    return prompts


def _onload(component: Any) -> None:
    """Have accelerate bring a component that it offloads, as it does where forward is called."""
    hook = getattr(component, "_hf_hook", None)
    if hook is not None:
        hook.pre_forward(component)


def _own_noise(scheduler: Any, settings: Sequence[SampleSettings]) -> dict[str, Any]:
    """For stochastic schedulers: noise of each picture's seed and number, as everything here."""
    if "generator" not in inspect.signature(scheduler.step).parameters:
        return {}
    own = [seeds.generator(each.seed, "solver", each.number) for each in settings]
    return {"generator": own}


def _forget_place(path: Path) -> None:
    """Take out the folder that a configuration was once read from, and parts that are not there."""
    values = json.loads(path.read_text())
    values.pop("_name_or_path", None)
    values = {key: value for key, value in values.items() if value != [None, None]}
    # diffusers' own layout, which escapes what is not ASCII.
    path.write_text(json.dumps(values, indent=2, sort_keys=True) + "\n")


def ensemble_card(shards: list[str], missing: list[str]) -> dict[str, Any]:
    """`atoll.json` of an ensemble folder."""
    return {"schema_version": 1, "kind": "ensemble", "shards": shards, "missing": missing}


def to_pil(x_data: Tensor) -> list[Image.Image]:
    """Pictures from pixels in [-1, 1], `(batch, channel, height, width)`."""
    scaled = ((x_data.float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).cpu().numpy()
    return [
        Image.fromarray(picture[0] if len(picture) == 1 else np.moveaxis(picture, 0, -1))
        for picture in scaled
    ]


diffusers.AtollPipeline = AtollPipeline
