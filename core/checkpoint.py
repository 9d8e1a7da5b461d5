"""Training states that survive anything: fencing generations, commit records, verified loading.

The protocol (no clocks, no modification times): a writer claims the next generation by exclusive
creation of `gen/G`, in which it names itself; writes the payload under a name that is never used
again; checks that no newer generation has been claimed; exclusively creates the commit record with
the payload's sha256 and its own; and deletes only what lies below the newest commits. Names start
with the generation, so that a writer that had to go back further than its predecessor is the newer
one all the same. Resuming takes the newest commit that verifies, else the one before it. Payloads
are safetensors, records JSON; nothing is pickled. Where several processes hold a part of every
tensor each, each writes its own payload and one seals them all; whoever reads them, in whatever
number, gets the rows it asks for.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save_file
from torch import Tensor

from atoll.core.digest import canonical_json, sha256_file
from atoll.core.errors import Fenced, Refused
from atoll.core.manifest import check_schema
from atoll.core.storage import Storage

SCHEMA_VERSION = 2  # 1 knew no guard and one average
_log = logging.getLogger("atoll")


@dataclass(frozen=True)
class Checkpoint:
    """A training state: where it stands, its tensors, and plain facts about it."""

    images_seen: int
    tensors: dict[str, Tensor]
    facts: dict[str, Any]


@dataclass(frozen=True)
class Piece:
    """Part `index` of `count` of every tensor; by default the whole.

    Of n rows it holds c = ceil(n / count) from `index` * c on, the last ones fewer or none, as
    torch's `chunk` and `fully_shard` have it. What has no dimension is in every part.
    """

    index: int = 0
    count: int = 1

    def of(self, whole: Tensor) -> Tensor:
        """This part's rows."""
        if whole.ndim == 0:
            return whole
        rows = -(-len(whole) // self.count)
        return whole[self.index * rows : (self.index + 1) * rows]


WHOLE = Piece()


def newest_generation(storage: Storage, folder: str) -> int:
    """The newest generation that a writer has claimed below a folder; 0 before the first."""
    names = (PurePosixPath(name).stem for name in storage.list(f"{folder}/gen"))
    return max((int(name) for name in names if name.isdigit()), default=0)


def newest_commit(storage: Storage, folder: str) -> int | None:
    """images_seen of the newest commit below a folder, which its name says; None before one."""
    names = storage.list(f"{folder}/commits")
    digits = _stem(names[-1]).rsplit("-", 1)[-1] if names else ""
    return int(digits) if digits.isdigit() else None


def newest_facts(storage: Storage, folder: str) -> dict[str, Any]:
    """The facts of the newest commit below a folder with a sound record; empty before one."""
    checkpoints = Checkpoints(storage, folder)
    for name in reversed(checkpoints.names()):
        with contextlib.suppress(Refused, FileNotFoundError, KeyError):
            return dict(checkpoints.record(name)["facts"])
    return {}


class Checkpoints:
    """The checkpoints of one island (or of the base) below a folder of the run."""

    def __init__(self, storage: Storage, folder: str, *, keep: int = 2) -> None:
        self._storage = storage
        self._folder = folder
        self._keep = keep
        self.generation = 0

    def claim(self) -> int:
        """Become the one writer of this place; every earlier writer is fenced from now on."""
        while True:
            generation = newest_generation(self._storage, self._folder) + 1
            try:
                self._storage.create(
                    f"{self._folder}/gen/{generation:06d}.json",
                    canonical_json(
                        {
                            "schema_version": SCHEMA_VERSION,
                            "generation": generation,
                            # A claim whose answer was lost must not be taken for another's, nor
                            # another's for it.
                            "writer": uuid.uuid4().hex,
                        }
                    ),
                )
            except FileExistsError:
                continue
            self.generation = generation
            # Payloads of which a killed writer wrote a part; their names are never used again.
            self._storage.sweep(f"{self._folder}/checkpoints")
            return generation

    def check_fence(self) -> None:
        """Raise `Fenced` when a newer generation has been claimed."""
        newest = newest_generation(self._storage, self._folder)
        if newest != self.generation:
            raise Fenced(
                f"Generation {newest} has taken over {self._folder} from {self.generation}",
                cure="let the newer writer work; this one has changed nothing since",
            )

    def write(
        self, images_seen: int, tensors: Mapping[str, Tensor], piece: Piece = WHOLE
    ) -> dict[str, Any]:
        """Write the payload of one part, which is nothing before `seal`; what that has to say."""
        self.check_fence()  # the check in `seal` is the one that counts; this leaves no payload
        part = "" if piece == WHOLE else f"-{piece.index}of{piece.count}"
        file = f"checkpoints/{self._name(images_seen)}{part}.safetensors"
        with self._storage.writing(f"{self._folder}/{file}") as path:
            save_file(dict(tensors), path)
            return {"file": file, "bytes": path.stat().st_size, "sha256": sha256_file(path)}

    def seal(
        self, images_seen: int, files: Sequence[Mapping[str, Any]], facts: Mapping[str, Any]
    ) -> None:
        """Commit what `write` gave, in the order of the parts."""
        self.check_fence()
        record = {
            "schema_version": SCHEMA_VERSION,
            "images_seen": images_seen,
            "generation": self.generation,
            "files": [dict(file) for file in files],
            "facts": dict(facts),
        }
        sealed = canonical_json({**record, "record_sha256": _record_sha256(record)})
        self._seal(f"{self._folder}/commits/{self._name(images_seen)}.json", sealed)
        self._prune()

    def names(self) -> list[str]:
        """The commits that are there, the newest one last."""
        return self._storage.list(f"{self._folder}/commits")

    def latest(
        self,
        piece: Piece = WHOLE,
        *,
        names: Sequence[str] | None = None,
        agreed: Callable[[bool], bool] = lambda found: found,
    ) -> Checkpoint | None:
        """The newest state that verifies, or None.

        Of several processes each gets its part: all are given the same `names`, and `agreed` says
        of whether one verified here whether it did everywhere.
        """
        for name in reversed(self.names() if names is None else names):
            found = self.load(name, piece)
            if agreed(found is not None):
                return found
            if _stem(name).startswith(f"{self.generation:06d}-"):
                # Ours and damaged: whoever goes on from the one before it comes by here again, and
                # commits under this name.
                self._storage.remove(name)
        return None

    def load(self, name: str, piece: Piece = WHOLE) -> Checkpoint | None:
        """A part of a committed state, or None where it does not verify: the log says why.

        Raises `Refused` where a sound one was made by a version of Atoll with another schema.
        """
        try:
            record = self.record(name)
            if record["schema_version"] == SCHEMA_VERSION:
                return self._load(record, piece)
        except (Refused, FileNotFoundError, KeyError, SafetensorError) as error:
            _log.warning("%s is passed over, the one before it is used: %s", name, error)
            return None
        check_schema(record, SCHEMA_VERSION, f"{self._storage.uri}/{name}")
        return None

    def _name(self, images_seen: int) -> str:
        return f"{self.generation:06d}-{images_seen:012d}"

    def _seal(self, name: str, sealed: bytes) -> None:
        """Create the record; one that is there already is ours where a store's answer was lost."""
        try:
            self._storage.create(name, sealed)
        except FileExistsError:
            if self._storage.read_bytes(name) != sealed:
                raise Refused(f"{name} is there and says something else") from None

    def record(self, name: str) -> dict[str, Any]:
        """A commit record, without the sha256 of its own that it was checked by; else `Refused`."""
        record = self._storage.read_json(name)
        if not isinstance(record, dict) or record.pop("record_sha256", "") != _record_sha256(
            record
        ):
            raise Refused(f"{name} does not have the sha256 that it names")
        return record

    def _load(self, record: dict[str, Any], piece: Piece) -> Checkpoint:
        files = record["files"]
        if len(files) == piece.count:
            tensors = self._payload(files[piece.index])
        else:
            parts = [self._payload(file) for file in files]
            tensors = {name: piece.of(_joined([p[name] for p in parts])) for name in parts[0]}
        return Checkpoint(record["images_seen"], tensors, record["facts"])

    def _payload(self, file: Mapping[str, Any]) -> dict[str, Tensor]:
        payload = self._storage.read_bytes(f"{self._folder}/{file['file']}")
        if hashlib.sha256(payload).hexdigest() != file["sha256"]:
            raise Refused(f"{file['file']} does not have the sha256 of its commit record")
        return load(payload)

    def _prune(self) -> None:
        """Delete what lies below the newest commits, payloads last, committed or not.

        Nothing is deleted above: it may be what a newer writer is about to commit.
        """
        commits = self._storage.list(f"{self._folder}/commits")
        for name in commits[: -self._keep]:
            self._storage.remove(name)
        oldest = _stem(commits[-self._keep :][0])
        for name in self._storage.list(f"{self._folder}/checkpoints"):
            if _stem(name) < oldest:
                self._storage.remove(name)


def _joined(parts: Sequence[Tensor]) -> Tensor:
    """The whole of which these are the parts."""
    return parts[0] if parts[0].ndim == 0 or len(parts) == 1 else torch.cat(list(parts))


def _stem(name: str) -> str:
    return PurePosixPath(name).stem


def _record_sha256(record: Mapping[str, Any]) -> str:
    # Through JSON first: what is hashed before writing must be what is hashed after reading.
    plain = json.loads(canonical_json(record))
    return hashlib.sha256(canonical_json(plain)).hexdigest()
