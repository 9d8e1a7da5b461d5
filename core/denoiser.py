"""A denoiser on disk and in memory: a diffusers network, its family's adapter, and its card.

A folder holds what diffusers writes (`config.json`, `diffusion_pytorch_model.safetensors`) and
`atoll.json`, the card.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, ValidationError
from torch import Tensor, nn

from atoll.core import flow
from atoll.core.conditioning import Conditioning
from atoll.core.digest import canonical_json
from atoll.core.errors import MissingError, Refused, UsageError
from atoll.core.families import FAMILIES, check_shapes
from atoll.core.manifest import Picture, check_schema
from atoll.core.schedule import NoiseSchedule

CARD_NAME = "atoll.json"
NETWORK_CONFIG = "config.json"  # diffusers' own
SCHEMA_VERSION = 1


class Card(BaseModel):
    """`atoll.json`: what a base, an expert or a soup is, and what it may be mixed with.

    `schedule` is the noise schedule that the network works on; None is our linear path, and then
    the file says nothing of it.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    schema_version: int = SCHEMA_VERSION
    name: str
    kind: Literal["base", "expert", "soup"]
    shard: str | None
    base_sha256: str | None
    family: str
    prediction: flow.Prediction
    schedule: NoiseSchedule | None = None
    latent_space: str
    images_seen: int

    def to_bytes(self) -> bytes:
        """The file's content, the same for the same card."""
        unsaid = {"schedule"} if self.schedule is None else set()
        return canonical_json(self.model_dump(mode="json", exclude=unsaid))


def read_card(folder: Path) -> Card:
    """The card of a denoiser's folder; `UsageError` where there is none, `Refused` if damaged."""
    path = folder / CARD_NAME
    try:
        values = json.loads(path.read_text())
    except (FileNotFoundError, NotADirectoryError):
        raise UsageError(
            f"There is no denoiser at {folder}", allowed=f"a folder with {CARD_NAME}"
        ) from None
    except ValueError as error:
        raise Refused(f"{path} is not readable JSON ({error})") from error
    check_schema(values, SCHEMA_VERSION, str(path))
    try:
        return Card.model_validate(values)
    except ValidationError as error:
        first = error.errors()[0]
        raise Refused(f"{path} is damaged: {first['loc']}: {first['msg']}") from error


def write_card(folder: Path, card: Card) -> None:
    """Write the card into a folder that is still being made."""
    (folder / CARD_NAME).write_bytes(card.to_bytes())


@dataclass
class Denoiser:
    """A network that can be asked for the velocity at (x_t, t, cond)."""

    network: nn.Module
    card: Card

    def output(self, x_t: Tensor, t: Tensor, cond: Conditioning) -> Tensor:
        """What the network itself puts out, `(batch, channel, height, width)`.

        `x_t` is the point of our path at `t`, which is within the span of the card's schedule.
        """
        schedule = self.card.schedule
        point, timestep = flow.rescale(x_t, t, schedule), flow.timestep(t, schedule)
        return FAMILIES[self.card.family].adapter(self.network, point, timestep, cond)

    def velocity(self, x_t: Tensor, t: Tensor, cond: Conditioning) -> Tensor:
        """dx_t/dt, `(batch, channel, height, width)`; `t` is `(batch,)` in [0, 1].

        The network runs in the dtype of its weights; the path, its times and the conversion stay
        in that of `x_t`. Beyond the span of what the network predicts and of its schedule, it is
        asked at the end point (`flow.answer`).
        """
        prediction, schedule = self.card.prediction, self.card.schedule
        asked = flow.ask(x_t, t, prediction, schedule)
        weight = next(self.network.parameters())
        point = flow.rescale(asked.x_t, asked.t, schedule).to(weight)
        timestep = flow.timestep(asked.t, schedule).to(weight.device)
        adapter = FAMILIES[self.card.family].adapter
        output = adapter(self.network, point, timestep, cond.to(weight)).to(x_t)
        return flow.answer(output, asked, x_t, t, prediction)

    def check_takes(self, picture: Picture) -> None:
        """Refuse pictures of a shape that the network does not take, by a `ConfigError`."""
        config: Any = self.network.config
        check_shapes(self.card.family, config, [picture])

    def save(self, folder: Path) -> None:
        """Write a component folder that diffusers loads too."""
        self.network.save_pretrained(folder)  # type: ignore[operator]
        # diffusers notes where it loaded a model from: a path of this machine, and other bytes for
        # the same expert wherever its run lies.
        config = json.loads((folder / NETWORK_CONFIG).read_text())
        config.pop("_name_or_path", None)
        (folder / NETWORK_CONFIG).write_bytes(canonical_json(config))
        write_card(folder, self.card)

    @classmethod
    def load(cls, folder: Path, dtype: torch.dtype | None = None) -> Denoiser:
        """Read a folder; the class comes from our table by the card's family, never from disk."""
        card = read_card(folder)
        return cls(load_network(folder, card.family, dtype), card)


def load_network(
    folder: Path, family: str, dtype: torch.dtype | None = None, **changes: Any
) -> nn.Module:
    """A family's network from a component folder, in evaluation mode; loading is strict.

    It is in `dtype`, float32 by default, whatever its file is in. `changes` replace values of its
    configuration.
    """
    if family not in FAMILIES:
        raise Refused(f"{folder} is of unknown family '{family}'", allowed=", ".join(FAMILIES))
    kind = FAMILIES[family].network
    try:
        declared = json.loads((folder / NETWORK_CONFIG).read_text()).get("_class_name")
    except (OSError, ValueError, AttributeError) as error:
        raise MissingError(f"{folder}/{NETWORK_CONFIG} is not readable ({error})") from error
    if declared != kind.__name__:
        raise Refused(f"{folder}/{NETWORK_CONFIG} names {declared}", allowed=kind.__name__)
    try:
        network, found = kind.from_pretrained(
            folder,
            local_files_only=True,
            use_safetensors=True,
            output_loading_info=True,
            torch_dtype=dtype,  # so that it never stands in memory in a wider one
            **changes,
        )
    # The last three are what a damaged configuration makes of constructors.
    except (OSError, ValueError, RuntimeError, TypeError, KeyError, ArithmeticError) as error:
        raise MissingError(f"The weights in {folder} cannot be loaded: {error}") from error
    if found["missing_keys"] or found["unexpected_keys"] or found["mismatched_keys"]:
        raise Refused(f"The weights in {folder} are not those of its config.json: {found}")
    # Some tables of positions it leaves in float32. Within a list, since diffusers warns of modules
    # that are not there when its own are cast.
    nn.ModuleList([network]).to(dtype)
    module: nn.Module = network.eval()
    return module


def new_network(family: str, config: dict[str, Any], *, seed: int) -> nn.Module:
    """A network with seeded random weights, the same for the same seed and configuration."""
    row = FAMILIES[family]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network: nn.Module = row.network(**config)
    if row.initialise is not None:
        row.initialise(network)
    return network
