"""A model on object storage or a hub, read in ranges: nothing of it is ever on this disk whole.

In: any fsspec URI of a folder or a safetensors file. Out: a local folder that looks like it, with
its small files and, for each file of weights, one of its size with nothing but its header in it,
which takes no space. Whoever reads tensors asks for their bytes here.
"""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from urllib.parse import urlsplit

from atoll.core.denoiser import CARD_NAME
from atoll.core.errors import DataError, Refused, UsageError
from atoll.core.lock import LOCK_NAME
from atoll.core.storage import Storage
from atoll.merge.model import PIPELINE_NAME, TEXTS, WEIGHTS_SUFFIX
from atoll.merge.recipe import RECIPE_NAME, STATE

Place = Path | str
"""Where a model lies: a local path, or a URI as text."""

# As the format's library has it; a longer header is none.
_MOST_HEADER_BYTES = 100_000_000


def place_of(text: str) -> Place:
    """A place as it is named; a URI of this machine's own disk is a path."""
    scheme, there, path = text.partition("://")
    if there and scheme in ("file", "local"):
        return Path(os.path.abspath("/" + path.lstrip("/")))
    return text if there else Path(text)


def is_uri(place: Place) -> bool:
    """Whether a place is a URI."""
    return isinstance(place, str) and "://" in place


def below(place: Place, name: str) -> Place:
    """What lies in a place by a relative name."""
    return place / name if isinstance(place, Path) else f"{place.rstrip('/')}/{name}"


class Far:
    """What lies at a URI; `path` is what stands for it here, until this object goes.

    Raises `UsageError` where there is nothing and something `must_be`, `Refused` for a URI that
    holds a secret, which would be written into recipes, and `DataError` where it is not understood.
    """

    def __init__(self, uri: str, *, must_be: bool = True) -> None:
        self.uri, self._must_be = uri.rstrip("/"), must_be
        check_uri(self.uri)
        above, _, name = self.uri.rpartition("/")
        self._scratch = tempfile.TemporaryDirectory(prefix="atoll-far-")
        folder = Path(self._scratch.name) / (_unversioned(above.rpartition("/")[2]) or "far")
        self.path = folder / _unversioned(name)
        try:
            self._look(above, name, folder)
        except (TypeError, ValueError) as error:  # of the client's own, on what it cannot parse
            raise DataError(
                f"{uri} is not understood ({type(error).__name__}: {error})",
                cure="check the URI, and that its server serves ranges and says how long files are",
            ) from error
        self._patient = self._storage.patient()  # by now it has answered

    def _look(self, above: str, name: str, folder: Path) -> None:
        if self.path.suffix == WEIGHTS_SUFFIX:
            self._storage, self._root = Storage(above), folder
            names = [name] if self._storage.exists(name) else []
            # An expert's file is an expert's, and a soup's a soup's.
            names += [n for n in (CARD_NAME, RECIPE_NAME) if names and self._storage.exists(n)]
        else:
            self._storage, self._root = Storage(self.uri), self.path
            names = [file for file in self._storage.list() if _is_looked_at(file)]
            self._look_above(above, folder)
        if not names and self._must_be:
            raise UsageError(f"There is nothing at {self.uri}", allowed="a folder or a file")
        self._names = {_unversioned(file) if file == name else file: file for file in names}
        for standing, file in self._names.items():
            self._stand_in(standing, file)

    def read(self, path: Path, at: int, into: memoryview) -> int:
        """Fill `into` with the bytes of a file from `at` on; how many those were."""
        name = self._names[path.relative_to(self._root).as_posix()]
        (data,) = self._patient.read_ranges([(name, at, at + len(into))])
        if len(data) > len(into):
            raise _no_ranges(self.uri)
        into[: len(data)] = data
        return len(data)

    def _look_above(self, above: str, folder: Path) -> None:
        """Whether it is a component of a pipeline: then that gives it its name."""
        if above.count("/") > 2 and Storage(above).exists(PIPELINE_NAME):
            folder.mkdir()
            (folder / PIPELINE_NAME).write_text("{}")

    def _stand_in(self, standing: str, name: str) -> None:
        place = self._root / standing
        place.parent.mkdir(parents=True, exist_ok=True)
        if place.suffix == WEIGHTS_SUFFIX:
            (length,) = self._storage.read_ranges([(name, 0, 8)])
            if len(length) > 8:
                raise _no_ranges(self.uri)
            size = int.from_bytes(length, "little")
            if size > _MOST_HEADER_BYTES:
                raise Refused(f"{name} of {self.uri} is not a safetensors file: its header is huge")
            (header,) = self._storage.read_ranges([(name, 0, 8 + size)])
            with place.open("wb") as file:
                file.write(header)
                file.truncate(self._storage.size(name))
        elif place.suffix in TEXTS:
            place.write_bytes(self._storage.read_bytes(name))


def _is_looked_at(file: str) -> bool:
    """Of a model that and its components, and of a soup its running state; nobody's lock."""
    return file != LOCK_NAME and (file.count("/") < 2 or file.startswith(f"{STATE}/"))


def _unversioned(name: str) -> str:
    """A part of a path without the revision that a hub's has, `NAME@REVISION`."""
    stem, _, revision = name.partition("@")
    return name if revision.endswith(WEIGHTS_SUFFIX) else stem


def check_uri(uri: str) -> None:
    """Refuse a URI that may hold a secret, and one whose path is not as it is written."""
    parts = urlsplit(uri)
    if parts.username or parts.password or (parts.query and parts.scheme in ("http", "https")):
        raise Refused(
            f"A URI of {parts.scheme}://{parts.hostname} holds a name, a password or a query",
            allowed="URIs without secrets: they are written into soup.json",
            cure="give credentials by the environment or fsspec's configuration",
        )
    # To a store these are names; relative to one another paths with them mean something else.
    if {"", ".", ".."} & set(uri.rstrip("/").partition("://")[2].split("/")[1:]):
        raise Refused(f"{uri} has empty parts, '.' or '..'", allowed="scheme://place/name/name")


def _no_ranges(uri: str) -> Refused:
    return Refused(
        f"The server of {uri} does not serve parts of files", cure="download it, and name the copy"
    )
