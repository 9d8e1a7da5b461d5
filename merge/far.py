"""A model on object storage or a hub, read in ranges: nothing of it is ever on this disk whole.

In: any fsspec URI of a folder or a safetensors file. Out: a local folder that looks like it, with
its small files and, for each file of weights, one of its size with nothing but its header in it,
which takes no space. Whoever reads tensors asks for their bytes here.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

from atoll.core.denoiser import CARD_NAME
from atoll.core.errors import Refused, UsageError
from atoll.core.storage import Storage
from atoll.merge.model import PIPELINE_NAME, TEXTS, WEIGHTS_SUFFIX
from atoll.merge.recipe import RECIPE_NAME

Place = Path | str
"""Where a model lies: a local path, or a URI as text."""

# As the format's library has it; a longer header is none.
_MOST_HEADER_BYTES = 100_000_000


def is_uri(place: Place) -> bool:
    """Whether a place is a URI."""
    return isinstance(place, str) and "://" in place


class Far:
    """What lies at a URI; `path` is what stands for it here, until this object goes."""

    def __init__(self, uri: str) -> None:
        self.uri = uri.rstrip("/")
        above, _, name = self.uri.rpartition("/")
        self._scratch = tempfile.TemporaryDirectory(prefix="atoll-far-")
        folder = Path(self._scratch.name) / (above.rpartition("/")[2].partition("@")[0] or "far")
        self.path = folder / name.partition("@")[0]
        if self.path.suffix == WEIGHTS_SUFFIX:
            self._storage, self._root = Storage(above), folder
            names = [name] if self._storage.exists(name) else []
        else:
            self._storage, self._root = Storage(self.uri), self.path
            names = [file for file in self._storage.list() if file.count("/") < 2]
            self._look_above(above, folder)
        if not names:
            raise UsageError(f"There is nothing at {uri}", allowed="a folder or a file")
        for file in names:
            self._stand_in(file)
        self._patient = self._storage.patient()  # by now it has answered

    def read(self, path: Path, at: int, into: memoryview) -> int:
        """Fill `into` with the bytes of a file from `at` on; how many those were."""
        name = path.relative_to(self._root).as_posix()
        (data,) = self._patient.read_ranges([(name, at, at + len(into))])
        into[: len(data)] = data
        return len(data)

    def _look_above(self, above: str, folder: Path) -> None:
        """Whether it is a component of a pipeline: then that gives it its name."""
        if above.count("/") > 2 and Storage(above).exists(PIPELINE_NAME):
            folder.mkdir()
            (folder / PIPELINE_NAME).write_text("{}")

    def _stand_in(self, name: str) -> None:
        place = self._root / name
        place.parent.mkdir(parents=True, exist_ok=True)
        if place.suffix == WEIGHTS_SUFFIX:
            (length,) = self._storage.read_ranges([(name, 0, 8)])
            size = int.from_bytes(length, "little")
            if size > _MOST_HEADER_BYTES:
                raise Refused(f"{self.uri}/{name} is not a safetensors file: its header is huge")
            (header,) = self._storage.read_ranges([(name, 0, 8 + size)])
            with place.open("wb") as file:
                file.write(header)
                file.truncate(self._storage.size(name))
        elif place.suffix in TEXTS or place.name in (CARD_NAME, RECIPE_NAME):
            place.write_bytes(self._storage.read_bytes(name))
