"""The manifest: what a run holds, where, and with which digest. Only the controller writes it.

Nothing in it depends on a clock, on where the run lies, or on the order in which shards came, so
that a run after a removal can be compared with one that never had the shard, byte by byte.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from atoll.core.errors import DataError, Refused, UsageError, did_you_mean
from atoll.core.storage import Storage

MANIFEST_NAME = "manifest.json"
SCHEMA_VERSION = 1
# Pixels of a side: those that `partition` takes for a square, and twice as many.
_LEAST_SIDE, _MOST_SIDE = 4, 2048

Size = tuple[int, int]
"""Height and width in pixels."""


class Entry(BaseModel):
    """Base of the manifest's parts: unknown keys are refused."""

    model_config = ConfigDict(extra="forbid", validate_assignment=True)


class Artefact(Entry):
    """A file or folder of the run, by name relative to it, and its sha256."""

    path: str
    sha256: str


class Picture(Entry):
    """The fixed shape `(channel, height, width)` of a training tensor, pixels or latents."""

    channels: int
    height: int
    width: int

    @property
    def shape(self) -> tuple[int, int, int]:
        return (self.channels, self.height, self.width)

    @property
    def size(self) -> str:
        """Its sides in words, as `parse_size` reads them."""
        return f"{self.height}x{self.width}"


def parse_size(text: str) -> Size:
    """The size that "HxW" names; `ValueError` says what is wrong with others."""
    found = re.fullmatch(r"([1-9]\d{0,3})x([1-9]\d{0,3})", text)
    size = (int(found[1]), int(found[2])) if found else (0, 0)
    if not all(_LEAST_SIDE <= side <= _MOST_SIDE for side in size):
        raise ValueError(
            f"'{text}' is no shape; allowed: HxW, height and width from {_LEAST_SIDE} to "
            f"{_MOST_SIDE} pixels"
        )
    return size


CLUSTERS = "clusters"  # `by` of a partition whose shards are not owners
# The latent space of training tensors that are pictures themselves.
PIXELS = "pixels"


class Plan(Entry):
    """What one island trains, fixed before any island starts; independent of all other shards."""

    batch: int
    images_seen: int


class Shard(Artefact):
    """Private records of one cluster or owner, and what its island is to do with them."""

    records: int
    held_out: int
    plan: Plan | None = None


class Commons(Artefact):
    """Records that every artefact may see. `declared` says how they were chosen."""

    declared: str
    records: int
    held_out: int


class Encoder(Artefact):
    """The embedding network; `fitted_on` names the shards whose records trained it, if any."""

    spec: str
    fitted_on: list[str] = Field(default_factory=list)


class Vae(Artefact):
    """The autoencoder whose latents are trained on: its space, and the pictures it makes."""

    spec: str
    latent_space: str
    picture: Picture


class Partition(Artefact):
    """Centroids and assignments; `fitted_on` names the shards whose records moved a centroid."""

    by: str
    fitted_on: list[str] = Field(default_factory=list)


class Expert(Artefact):
    """An island's results: the expert's folder and its gate head's."""

    gate_head: Artefact
    images_seen: int


class Manifest(Entry):
    """All of `manifest.json`."""

    schema_version: int = SCHEMA_VERSION
    picture: Picture  # where there are buckets, that of the main one
    # All shapes of training tensors, where there are several; the key is absent where not.
    buckets: list[Picture] | None = Field(
        default=None, min_length=1, exclude_if=lambda buckets: buckets is None
    )
    encoder: Encoder
    vae: Vae | None = None  # None: training tensors are pixels
    partition: Partition
    commons: Commons
    shards: dict[str, Shard]
    seed: int
    recipe: str | None = None
    base: Artefact | None = None
    trunk: Artefact | None = None  # of the gate
    joint_gate: Artefact | None = None  # descends from every shard
    experts: dict[str, Expert] = Field(default_factory=dict)
    ensemble: Artefact | None = None
    soups: dict[str, Artefact] = Field(default_factory=dict)
    exports: list[str] = Field(default_factory=list)

    @classmethod
    def load(cls, storage: Storage) -> Manifest:
        """Read and check it; `UsageError` where there is no run, `Refused` where it is damaged."""
        try:
            values = storage.read_json(MANIFEST_NAME)
        except (FileNotFoundError, NotADirectoryError):
            raise UsageError(
                f"There is no run at {storage.uri}",
                allowed=f"a folder with {MANIFEST_NAME}",
                cure="make one with `atoll partition CORPUS RUN --shards K`",
            ) from None
        check_schema(values, SCHEMA_VERSION, f"{storage.uri}/{MANIFEST_NAME}")
        try:
            return cls.model_validate(values)
        except ValidationError as error:
            first = error.errors()[0]
            raise Refused(
                f"{storage.uri}/{MANIFEST_NAME} is damaged: "
                f"{'.'.join(map(str, first['loc']))}: {first['msg']}",
                cure="restore it from a copy; nothing was changed",
            ) from error

    def save(self, storage: Storage) -> None:
        """Write it, complete or not at all."""
        storage.write_json(MANIFEST_NAME, self.model_dump(mode="json"))

    @property
    def pictures(self) -> list[Picture]:
        """The shapes of training tensors, one or several."""
        return self.buckets or [self.picture]

    @property
    def latent_space(self) -> str:
        """What training tensors are: pixels, or an autoencoder's latents."""
        return PIXELS if self.vae is None else self.vae.latent_space

    def add_export(self, place: str) -> None:
        """List a place outside the run, absolutely, so that a removal finds it again."""
        uri = place if "://" in place else str(Path(place).resolve())
        self.exports = sorted({*self.exports, uri})

    def artefacts(self) -> dict[str, str]:
        """Every artefact that is named here, by path -> sha256."""
        entries: list[Artefact] = [self.encoder, self.commons, self.partition]
        entries += self.shards.values()
        entries += [
            e
            for e in (self.vae, self.base, self.trunk, self.joint_gate, self.ensemble)
            if e is not None
        ]
        for expert in self.experts.values():
            entries += [expert, expert.gate_head]
        entries += self.soups.values()
        return {entry.path: entry.sha256 for entry in entries}

    def shard(self, name: str) -> Shard:
        """The shard of that name, or the error that lists which there are."""
        if name not in self.shards:
            raise UsageError(
                f"There is no shard '{name}'. {did_you_mean(name, self.shards)}".strip(),
                allowed=", ".join(self.shards),
            )
        return self.shards[name]


def check_schema(values: Any, expected: int, where: str) -> None:
    """Refuse a file that another version of Atoll wrote."""
    found = values.get("schema_version") if isinstance(values, dict) else None
    if found != expected:
        raise Refused(
            f"{where} has schema version {found!r}",
            allowed=str(expected),
            cure="use the version of Atoll that wrote it, or start a new run",
        )


def check_artefact(storage: Storage, artefact: Artefact) -> None:
    """Refuse an artefact whose files are not those that the manifest recorded."""
    if not storage.exists(artefact.path):
        raise Refused(
            f"{storage.uri}/{artefact.path} is in the manifest and not in storage",
            cure="restore it from a copy; nothing was changed",
        )
    found = storage.sha256(artefact.path)
    if found != artefact.sha256:
        raise Refused(
            f"{storage.uri}/{artefact.path} has sha256 {found[:16]}..., "
            f"the manifest says {artefact.sha256[:16]}...",
            cure="the files were changed after they were recorded; restore them from a copy",
        )


def require(artefact: Artefact | None, what: str, cure: str) -> Artefact:
    """The artefact, or the error that says which command makes it."""
    if artefact is None:
        raise DataError(f"This run has no {what} yet", cure=cure)
    return artefact
