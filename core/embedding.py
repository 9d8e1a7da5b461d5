"""The encoder: CLIP by open_clip, with its preprocessing and fingerprint, as a diffusers component.

Made from `hf-hub:ORG/NAME`, `local-dir:FOLDER`, an `ARCHITECTURE/PRETRAINED` tag of open_clip, or
fitted on image-caption pairs by `fit` (`partitioner` gives it the commons') for corpora where no
weights are within reach. Saved with its whole configuration, so that it loads without the network.
This is the one file that imports open_clip, and only when an encoder is used.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import ModelMixin
from diffusers.configuration_utils import ConfigMixin, register_to_config
from PIL import Image
from safetensors import SafetensorError, safe_open
from torch import Tensor
from torch.nn import functional

from atoll.core import seeds
from atoll.core.conditioning import Conditioning, is_empty
from atoll.core.config import Config
from atoll.core.errors import ConfigError, MissingError, Refused, UsageError, did_you_mean
from atoll.core.fingerprint import fingerprint
from atoll.core.journal import progress

_BATCH = 256
_TEXT_PROJECTION = re.compile(r"clip\.(text\.)?text_projection(?:\.(weight|bias))?")


class FitConfig(Config):
    """How `fit` trains a small CLIP on image-caption pairs."""

    steps: int = 600
    batch: int = 64
    learning_rate: float = 2e-3
    weight_decay: float = 0.1
    warmup: int = 20
    image_size: int = 16
    patch_size: int = 4
    width: int = 64
    layers: int = 2
    context_length: int = 16
    # Largest random shift (of half the picture), scale, rotation (radians), and pixel noise.
    shift: float = 0.15
    scale: float = 0.1
    rotation: float = 0.15
    noise: float = 0.05


class Encoder(ModelMixin, ConfigMixin):  # type: ignore[misc]
    """An open_clip model that embeds pictures and captions into one space."""

    config_name = "config.json"

    @register_to_config  # type: ignore[untyped-decorator]
    def __init__(self, spec: str, model: dict[str, Any], preprocess: dict[str, Any]) -> None:
        super().__init__()
        import open_clip
        from open_clip.transform import PreprocessCfg, image_transform_v2

        _check_towers(spec, model)
        kind = open_clip.CustomTextCLIP if model.get("custom_text") else open_clip.CLIP
        self.clip = kind(**{k: v for k, v in model.items() if k != "custom_text"})
        self._transform = image_transform_v2(PreprocessCfg(**preprocess), is_train=False)
        self._tokenize = open_clip.SimpleTokenizer(
            context_length=int(model["text_cfg"].get("context_length", 77))
        )

    @property
    def _text(self) -> Any:
        return getattr(self.clip, "text", self.clip)

    @property
    def text_width(self) -> int:
        """Width of the text tokens in `condition`."""
        return int(self._text.ln_final.normalized_shape[0])

    @property
    def dim(self) -> int:
        """Dimension of the common space of pictures and captions."""
        return int(self.config.model["embed_dim"])

    @torch.no_grad()
    def embed_images(self, images: Sequence[Image.Image]) -> Tensor:
        """Unit vectors `(n, dim)`, float32."""
        parts = []
        for start in range(0, len(images), _BATCH):
            batch = [self._transform(i.convert("RGB")) for i in images[start : start + _BATCH]]
            parts.append(self.clip.encode_image(torch.stack(batch).to(self.device)))
        return functional.normalize(torch.cat(parts).float(), dim=1).cpu()

    @torch.no_grad()
    def embed_text(self, captions: Sequence[str]) -> Tensor:
        """Unit vectors `(n, dim)`, float32."""
        return self.condition(captions).pooled

    @torch.no_grad()
    def condition(self, captions: Sequence[str]) -> Conditioning:
        """Token states after the last norm, their mask, and the pooled unit vector.

        Shapes as in `Conditioning`. The tower is causal, so what stands behind the end-of-text
        token says nothing and is masked.
        """
        if not captions:
            raise UsageError("There is nothing to embed", allowed="at least one caption")
        parts = [
            self._condition(captions[start : start + _BATCH])
            for start in range(0, len(captions), _BATCH)
        ]
        tokens, mask, pooled = (torch.cat(column).cpu() for column in zip(*parts, strict=True))
        return Conditioning(tokens, mask, pooled, is_empty(mask))

    def _condition(self, captions: Sequence[str]) -> tuple[Tensor, Tensor, Tensor]:
        ids = self._tokenize(list(captions)).to(self.device)
        text = self._text
        x = text.token_embedding(ids) + text.positional_embedding[: ids.shape[1]]
        states = text.ln_final(text.transformer(x, attn_mask=text.attn_mask)).float()
        end = ids.argmax(dim=1)  # end-of-text has the highest id
        mask = torch.arange(ids.shape[1], device=ids.device)[None] <= end[:, None]
        pooled = functional.normalize(self.clip.encode_text(ids).float(), dim=1)
        return states * mask[:, :, None], mask, pooled

    def fingerprint(self) -> str:
        """Hex sha256 over configuration and weights: two encoders with one are the same."""
        settings = {"model": self.config.model, "preprocess": self.config.preprocess}
        return fingerprint(settings, self)


def _check_towers(spec: str, model: dict[str, Any]) -> None:
    """Refuse text towers that `condition` would read wrongly, and what reaches for the network.

    Those that are not open_clip's own, have a tokenizer of their own, see what comes after a token,
    or end anywhere but at the end-of-text token.
    """
    text = model["text_cfg"]
    foreign = sorted({"hf_model_name", "hf_tokenizer_name", "tokenizer_kwargs"} & text.keys())
    if text.get("no_causal_mask") or text.get("embed_cls") or "multimodal_cfg" in model:
        foreign.append("a tower that is not causal")
    if text.get("pool_type", "argmax") != "argmax":
        foreign.append(f"pool_type {text['pool_type']}")
    vision = model.get("vision_cfg", {})
    if vision.get("timm_model_pretrained") or ":" in str(vision.get("timm_model_name", "")):
        foreign.append("a vision tower that would be downloaded")
    if foreign:
        raise ConfigError(
            f"The towers of {spec} are not supported: {', '.join(foreign)}",
            cure="choose an encoder with CLIP's own text tower, such as ViT-B-32",
        )


def load_encoder(folder: Path) -> Encoder:
    """Read an encoder's component folder; needs no network."""
    try:
        declared = json.loads((folder / "config.json").read_text())
        if not isinstance(declared, dict) or declared.get("_class_name") != Encoder.__name__:
            raise Refused(f"{folder}/config.json is not an encoder's")
        encoder, found = Encoder.from_pretrained(
            folder, local_files_only=True, use_safetensors=True, output_loading_info=True
        )
    except OSError as error:
        raise MissingError(f"There is no encoder at {folder} ({error})") from error
    # What a damaged configuration makes of open_clip's constructors, and other weights of diffusers
    except (ValueError, TypeError, KeyError, AttributeError, RuntimeError) as error:
        raise Refused(f"The encoder at {folder} is damaged ({error})") from error
    if found["missing_keys"] or found["unexpected_keys"]:
        raise Refused(f"The weights in {folder} are not those of its config.json: {found}")
    loaded: Encoder = encoder.eval()
    return loaded


def text_projection(folder: Path) -> dict[str, Tensor]:
    """What takes the state of the end of text to the pooled vector, before it is made a unit one.

    `weight` `(width, dim)` and `bias` `(dim,)`, float32, each where the encoder has one. Read from
    the weights' files alone: neither open_clip nor the encoder is loaded.
    """
    found: dict[str, Tensor] = {}
    try:
        for path in sorted(folder.glob("*.safetensors")):
            with safe_open(path, framework="pt") as file:
                for key in file.keys():  # noqa: SIM118  it is no mapping
                    if match := _TEXT_PROJECTION.fullmatch(key):
                        # A layer keeps its matrix the other way round than a bare parameter.
                        matrix = file.get_tensor(key).float()
                        found[match[2] or "weight"] = matrix.T if match[2] == "weight" else matrix
    except (OSError, SafetensorError) as error:
        raise Refused(f"The encoder at {folder} is damaged ({error})") from error
    return found


def encoder_from_spec(spec: str) -> Encoder:
    """An encoder with published weights; `fit` is made by `fit` instead.

    Raises `ConfigError` for a specification or architecture that does not exist and `MissingError`
    when the weights cannot be reached.
    """
    import open_clip

    if not spec.startswith(("hf-hub:", "local-dir:")):
        architecture, _, pretrained = spec.partition("/")
        if architecture not in open_clip.list_models() or not pretrained:
            raise ConfigError(
                f"Unknown encoder '{spec}'. "
                f"{did_you_mean(architecture, ['fit', *open_clip.list_models()])}".strip(),
                allowed="fit, hf-hub:ORG/NAME, local-dir:FOLDER or ARCHITECTURE/PRETRAINED",
            )
        known = open_clip.list_pretrained_tags_by_model(architecture)
        if pretrained not in known:
            raise ConfigError(
                f"{architecture} has no weights '{pretrained}'. "
                f"{did_you_mean(pretrained, known)}".strip(),
                allowed=", ".join(known) or "none",
            )
        _check_towers(spec, open_clip.get_model_config(architecture))
        name, source = architecture, pretrained
    else:
        name, source = spec, None
    try:
        clip, _, _ = open_clip.create_model_and_transforms(name, pretrained=source)
        preprocess = dict(clip.visual.preprocess_cfg)
        if spec.startswith("local-dir:"):
            config = json.loads((Path(spec[10:]) / "open_clip_config.json").read_text())[
                "model_cfg"
            ]
        elif spec.startswith("hf-hub:"):
            config = open_clip.factory._get_hf_config(spec[7:])["model_cfg"]
        else:
            config = open_clip.get_model_config(architecture)
    except Exception as error:  # open_clip raises anything from OSError to KeyError here
        raise MissingError(
            f"The weights of encoder '{spec}' are not within reach ({error})",
            cure="give local-dir:FOLDER with the weights, or --encoder fit",
        ) from error
    if isinstance(clip, open_clip.CustomTextCLIP):
        config = {**config, "custom_text": True}
    encoder: Encoder = Encoder(spec=spec, model=config, preprocess=preprocess)
    encoder.clip.load_state_dict(clip.state_dict())
    encoder.eval()
    return encoder


def fit(
    images: Sequence[Image.Image], captions: Sequence[str], config: FitConfig, *, seed: int
) -> Encoder:
    """Train a small CLIP on pairs (Radford et al. 2021, arXiv 2103.00020, figure 3), seeded."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seeds.key(seed, "encoder") & ((1 << 63) - 1))
        encoder: Encoder = Encoder(
            spec="fit", model=_small_model(config), preprocess=_preprocess(config)
        )
    pixels = torch.stack([encoder._transform(image.convert("RGB")) for image in images])
    unique = sorted(set(captions))
    ids = encoder._tokenize(unique)
    which = torch.tensor([unique.index(caption) for caption in captions])
    optimizer = _optimizer(encoder, config)
    batch = min(config.batch, len(pixels))
    with progress("fitting the encoder", config.steps) as advance:
        for step in range(config.steps):
            where = {"first": step * batch, "count": batch}
            rows = torch.from_numpy(seeds.order(seed, "encoder", "order", n=len(pixels), **where))
            views = _augmented(pixels[rows], config, seed=seed, **where)
            for group in optimizer.param_groups:
                group["lr"] = config.learning_rate * _schedule(step, config)
            loss = _contrastive(encoder, views, ids, which[rows])
            optimizer.zero_grad(set_to_none=True)
            loss.backward()  # type: ignore[no-untyped-call]
            torch.nn.utils.clip_grad_norm_(encoder.parameters(), 1.0)
            optimizer.step()
            advance(1, note=f"loss {float(loss.detach()):.3f}")
    encoder.eval()
    return encoder


def _optimizer(encoder: Encoder, config: FitConfig) -> torch.optim.AdamW:
    """AdamW that lets only matrices decay: gains, biases and the temperature stay free."""
    parameters = list(encoder.parameters())
    return torch.optim.AdamW(
        [
            {"params": [p for p in parameters if p.ndim > 1], "weight_decay": config.weight_decay},
            {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
        ],
        lr=config.learning_rate,
        betas=(0.9, 0.98),
        fused=True,
    )


def _schedule(step: int, config: FitConfig) -> float:
    """A short linear warm-up, then half a cosine down to 0."""
    done = step / config.steps
    return min(1.0, (step + 1) / config.warmup) * (0.5 + 0.5 * math.cos(math.pi * done))


def _augmented(pixels: Tensor, config: FitConfig, *, seed: int, first: int, count: int) -> Tensor:
    """Pictures moved, scaled, turned and made noisy a little, each by draws of its own."""
    where = {"first": first, "count": count}
    u = seeds.uniform(seed, "encoder", "augment", each=4, **where).float() * 2 - 1
    angle, zoom = config.rotation * u[:, 0], 1 + config.scale * u[:, 1]
    matrix = torch.stack(
        [
            torch.stack([zoom * angle.cos(), -zoom * angle.sin(), config.shift * u[:, 2]], dim=1),
            torch.stack([zoom * angle.sin(), zoom * angle.cos(), config.shift * u[:, 3]], dim=1),
        ],
        dim=1,
    )
    grid = functional.affine_grid(matrix, list(pixels.shape), align_corners=False)
    moved = functional.grid_sample(pixels, grid, padding_mode="border", align_corners=False)
    shape = tuple(pixels.shape[1:])
    return moved + config.noise * seeds.normal(seed, "encoder", "noise", shape=shape, **where)


def _contrastive(encoder: Encoder, pixels: Tensor, ids: Tensor, caption: Tensor) -> Tensor:
    """Symmetric cross-entropy; pictures and texts that share a caption are each other's positives.

    Each caption is encoded once, however many pictures have it.
    """
    present, place = torch.unique(caption, return_inverse=True)
    image = functional.normalize(encoder.clip.encode_image(pixels), dim=1)
    text = functional.normalize(encoder.clip.encode_text(ids[present]), dim=1)[place]
    logits = encoder.clip.logit_scale.exp().clamp(max=100) * image @ text.T
    same = (caption[:, None] == caption[None]).float()
    wanted = same / same.sum(dim=1, keepdim=True)
    loss = functional.cross_entropy(logits, wanted) + functional.cross_entropy(logits.T, wanted)
    return loss / 2


def _small_model(config: FitConfig) -> dict[str, Any]:
    heads = max(1, config.width // 32)
    return {
        "embed_dim": config.width,
        "vision_cfg": {
            "image_size": config.image_size,
            "patch_size": config.patch_size,
            "width": config.width,
            "head_width": config.width // heads,
            "layers": config.layers,
        },
        "text_cfg": {
            "context_length": config.context_length,
            "width": config.width,
            "heads": heads,
            "layers": config.layers,
        },
    }


def _preprocess(config: FitConfig) -> dict[str, Any]:
    return {
        "size": [config.image_size, config.image_size],
        "mode": "RGB",
        "mean": [0.5, 0.5, 0.5],
        "std": [0.5, 0.5, 0.5],
        "interpolation": "bicubic",
        "resize_mode": "shortest",
        "fill_color": 0,
    }
