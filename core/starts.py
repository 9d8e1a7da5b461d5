"""Weights to start from: a denoiser of ours, or what others saved with diffusers.

Reads a folder of ours (`atoll.json`), a diffusers component folder (`config.json`), a pipeline
folder (`model_index.json`, whose scheduler says what its network predicts) or a repository of the
Hugging Face hub with one of these. Classes are accepted from the table of families alone, and
weights as safetensors alone.

A checkpoint may be continued as another prediction: training then has another target. Checkpoints
of diffusion have also learned another path than ours, the noise schedule of their pipeline's
scheduler: they may be continued on it, or on ours.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from atoll.core.denoiser import CARD_NAME, Card, load_network, read_card
from atoll.core.digest import sha256_folder
from atoll.core.errors import MissingError, Refused, UsageError
from atoll.core.families import FAMILIES, FAMILY_OF_CLASS, sample_size
from atoll.core.flow import Prediction
from atoll.core.manifest import Picture
from atoll.core.schedule import NoiseSchedule, schedule_of

HUB = "hf-hub:"
_INDEX = "model_index.json"
_CONFIG = "config.json"
_SCHEDULER = "scheduler/scheduler_config.json"
_PARTS = ("transformer", "unet")
_WEIGHTS = "diffusion_pytorch_model.safetensors"
_SHARDS = f"{_WEIGHTS}.index.json"
# Neither other precisions nor the text encoders, which are most of a repository's bytes.
_WANTED = [_INDEX, _SCHEDULER] + [
    f"{prefix}{name}"
    for prefix in ("", *(f"{part}/" for part in _PARTS))
    for name in (_CONFIG, _WEIGHTS, _SHARDS, "diffusion_pytorch_model-*-of-*.safetensors")
]

# What schedulers of diffusers call a prediction, where we call it otherwise.
_FLOW = "flow_prediction"
_PREDICTIONS = {"sample": Prediction.X_DATA, _FLOW: Prediction.VELOCITY}

# Keys by which networks ask for conditioning that ours has not.
_ASKS: dict[str, tuple[str, ...]] = {
    "unet": (
        "addition_embed_type",
        "class_embed_type",
        "encoder_hid_dim_type",
        "time_cond_proj_dim",
    ),
    "pixart": ("use_additional_conditions",),
}


@dataclass(frozen=True)
class Start:
    """A loaded network in evaluation mode, and what is known about it.

    `declared` is what the source says that the weights put out (None where it says nothing),
    `prediction` what they are to be trained for: the caller's choice, or as declared. `schedule` is
    the path for it: the caller's choice, or the source's own where that is kept. `sha256` is over
    the files that were read of the network, as `sha256_folder` computes it. `latent_space` is known
    where the folder is one of ours.
    """

    network: nn.Module
    family: str
    prediction: Prediction
    schedule: NoiseSchedule | None
    declared: str | None
    sha256: str
    latent_space: str | None


def load_start(
    spec: str,
    picture: Picture,
    *,
    text_width: int,
    pooled_width: int,
    prediction: Prediction | None = None,
    schedule: NoiseSchedule | None = None,
    keep_path: bool = False,
) -> Start:
    """The weights at `spec`: a folder, or `hf-hub:ORG/NAME` with `@REVISION` if wanted.

    Where no `schedule` is given they go on on our linear path, or with `keep_path` on their own.
    `picture` and the widths of the text are those of the data: what was made for others is refused.
    Raises `UsageError` where nothing is or nothing says what the weights predict, `MissingError`
    for weights out of reach, `Refused` for what is not ours to continue, and `ConfigError` for
    pictures that do not fit.
    """
    root = downloaded(spec, _WANTED) if spec.startswith(HUB) else Path(spec)
    folder, said = _component(root, spec)
    declared = said.prediction
    config = _json(folder / _CONFIG)
    family = _family(config, folder)
    files = [CARD_NAME, _CONFIG, *weight_files(folder)]
    try:
        size = sample_size(family, config, picture)
    except (KeyError, TypeError, ValueError, ArithmeticError) as error:
        raise Refused(f"{folder / _CONFIG} is damaged ({error!r})") from error
    network = load_network(folder, family, sample_size=size)
    _check_fits(network, family, picture, text_width, pooled_width, spec)
    return Start(
        network=network,
        family=family,
        prediction=prediction or _predicted(declared, spec),
        schedule=_own_schedule(said, spec) if keep_path and schedule is None else schedule,
        declared=declared,
        sha256=sha256_folder(folder, files),
        latent_space=(read_card(folder).latent_space if (folder / CARD_NAME).is_file() else None),
    )


@dataclass(frozen=True)
class _Said:
    """What a source says of its network: what it predicts, and on which path, unless nothing.

    The path is that of a card of ours, or still in the configuration of a scheduler of diffusers.
    """

    prediction: str | None = None
    path: Card | Mapping[str, Any] | None = None


def _component(root: Path, spec: str) -> tuple[Path, _Said]:
    """The network's folder below `root`, and what the source says of it."""
    if (root / _INDEX).is_file():
        index = _json(root / _INDEX)
        for part in _PARTS:
            entry = index.get(part)
            if isinstance(entry, list) and entry[-1:] != [None]:
                scheduler = _json(root / _SCHEDULER)
                return root / part, _Said(_declared(scheduler), scheduler)
        raise Refused(f"The pipeline {spec} has no network of its own", allowed=" or ".join(_PARTS))
    if (root / CARD_NAME).is_file():
        card = read_card(root)
        return root, _Said(str(card.prediction), card)
    if (root / _CONFIG).is_file():
        return root, _Said()
    raise UsageError(
        f"There is nothing to start from at {spec}",
        allowed=f"a folder with {CARD_NAME}, {_CONFIG} or {_INDEX}, or {HUB}ORG/NAME",
    )


def _declared(scheduler: Mapping[str, Any]) -> str:
    if str(scheduler.get("_class_name")).startswith("FlowMatch"):
        return _FLOW
    # Pipelines older than the key say nothing: there was but one kind.
    return str(scheduler.get("prediction_type", "epsilon"))


def _own_schedule(said: _Said, spec: str) -> NoiseSchedule | None:
    """The path that a network has learnt; None is ours."""
    if said.path is None:
        raise UsageError(
            f"Nothing at {spec} says on which path its network works",
            allowed="a pipeline's folder with its scheduler, or a folder of ours",
            cure="say it by training.schedule, or leave out training.keep_path for our linear path",
        )
    if isinstance(said.path, Card):
        return said.path.schedule
    return None if said.prediction == _FLOW else schedule_of(said.path, spec)


def _predicted(declared: str | None, spec: str) -> Prediction:
    allowed = ", ".join(Prediction)
    if declared is None:
        raise UsageError(
            f"Nothing at {spec} says what its network predicts",
            allowed=allowed,
            cure="choose the prediction to train for",
        )
    known = {**_PREDICTIONS, **{kind.value: kind for kind in Prediction}}
    if declared not in known:
        raise Refused(
            f"The network of {spec} predicts {declared}, which cannot be converted to a velocity",
            allowed=allowed,
            cure="choose the prediction that these weights are to be trained for from now on",
        )
    return known[declared]


def _family(config: Mapping[str, Any], folder: Path) -> str:
    name = config.get("_class_name")
    family = FAMILY_OF_CLASS.get(name) if isinstance(name, str) else None
    if family is None:
        raise Refused(
            f"{folder / _CONFIG} names the class {name}",
            allowed=", ".join(FAMILY_OF_CLASS),
            cure="give one of its experts, where this is an ensemble, or another model",
        )
    asked = [key for key in _ASKS.get(family, ()) if config.get(key) not in (None, False)]
    # diffusers takes an absent value for yes at this one size.
    if family == "pixart" and config.get("use_additional_conditions") is None:
        asked += ["use_additional_conditions"] if config.get("sample_size", 128) == 128 else []
    if asked:
        raise Refused(
            f"The network in {folder} asks for conditioning besides the caption: "
            f"{', '.join(asked)}",
            cure="start from a model without it, such as the smaller one of the same series",
        )
    return family


def _check_fits(
    network: nn.Module,
    family: str,
    picture: Picture,
    text_width: int,
    pooled_width: int,
    spec: str,
) -> None:
    """Refuse a network for other channels, a larger grid than it knows, or another text encoder."""
    config: Any = network.config
    row = FAMILIES[family]
    wanted = {"in_channels": picture.channels}
    if config.out_channels is not None and family != "pixart":  # whose variance is left aside
        wanted["out_channels"] = picture.channels
    if row.tokens is not None:
        wanted[row.tokens] = text_width
    if row.pooled is not None:
        wanted[row.pooled] = pooled_width
    if wrong := {key: config[key] for key, value in wanted.items() if config[key] != value}:
        given = ", ".join(f"{key}={value}" for key, value in wrong.items())
        needed = ", ".join(f"{key}={wanted[key]}" for key in wrong)
        raise Refused(
            f"The network of {spec} has {given}, this data has {needed}",
            cure="choose another start, or prepare the data with the encoder and latents that "
            "this one was trained on",
        )
    side = max(picture.height, picture.width)
    known = config.get("pos_embed_max_size")
    if known is not None and side // config["patch_size"] > known:
        raise Refused(
            f"The network of {spec} knows {known * config['patch_size']} positions a side, these "
            f"pictures have {side}",
            cure="choose smaller pictures, or another start",
        )


def weight_files(folder: Path) -> list[str]:
    """The names of the files that hold the weights of a component folder, an index among them."""
    if not (folder / _SHARDS).is_file():
        return [_WEIGHTS]
    shards = _json(folder / _SHARDS).get("weight_map")
    names = sorted({str(name) for name in shards.values()}) if isinstance(shards, dict) else []
    if not names or any(Path(name).name != name for name in names):
        raise Refused(f"{folder / _SHARDS} names {names}", allowed=f"files in {folder}")
    return [_SHARDS, *names]


def _json(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise MissingError(f"{path} is not readable JSON ({error})") from error
    if not isinstance(values, dict):
        raise Refused(f"{path} is not a JSON object")
    return values


def downloaded(spec: str, wanted: Sequence[str]) -> Path:
    """A local copy of the files `wanted` of a repository of the hub."""
    from huggingface_hub import snapshot_download

    name, _, revision = spec.removeprefix(HUB).partition("@")
    if name.count("/") != 1:
        raise UsageError(f"{spec} names no repository", allowed=f"{HUB}ORG/NAME[@REVISION]")
    try:
        return Path(snapshot_download(name, revision=revision or None, allow_patterns=list(wanted)))
    except Exception as error:  # from OSError to the errors of whichever HTTP client is beneath
        raise MissingError(
            f"{spec} is not within reach ({error})",
            cure="check name, network and, for a gated model, HF_TOKEN; or give a folder that it "
            "was downloaded to",
        ) from error
