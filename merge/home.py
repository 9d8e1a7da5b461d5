"""Where a soup lies: a folder here, or one at a URI.

What lies at a URI is seen as models there are (`far.py`): small files whole, weights in ranges. A
soup that goes there is made in a scratch folder of this disk and put file by file, since no store
replaces a folder at once. While it is put, `lock.json` keeps other writers out and what readers
look for first is away; the recipe is replaced last, and where there is none it comes first: so that
whoever is killed on the way leaves a soup that `verify` does not let pass and that the same command
makes whole.
"""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from atoll.core.denoiser import CARD_NAME, Card, read_card
from atoll.core.digest import sha256_file, sha256_named
from atoll.core.disk import drop, locked, recover, replacing
from atoll.core.errors import Refused, UsageError
from atoll.core.journal import progress
from atoll.core.lock import LOCK_NAME, exclusive
from atoll.core.storage import Storage
from atoll.merge.far import Far, Place, check_uri, is_uri
from atoll.merge.model import WEIGHTS_SUFFIX
from atoll.merge.recipe import RECIPE_NAME, STATE, Recipe
from atoll.merge.weights import Weights

_PIECE_BYTES = 1 << 22


class Home:
    """The folder of a soup as it stands; `path` is that, or what stands for it here."""

    def __init__(self, place: Place) -> None:
        self.place = place
        self._far = Far(str(place), must_be=False) if is_uri(place) else None
        self.path = Path(place) if self._far is None else self._far.path

    @property
    def is_empty(self) -> bool:
        """Whether nothing at all lies there, of a soup or of anybody's."""
        if self._far is None:
            return not self.path.exists() or (self.path.is_dir() and not any(self.path.iterdir()))
        return not set(Storage(str(self.place)).list()) - {LOCK_NAME}

    def names(self, folder: str = "") -> list[str]:
        """All files below a folder, sorted."""
        found = (file for file in (self.path / folder).rglob("*") if file.is_file())
        return sorted(file.relative_to(self.path).as_posix() for file in found)

    def recipe(self) -> Recipe:
        """What is in the soup; `UsageError` where there is none, `Refused` if it is damaged."""
        return Recipe.load(self.path, called=self.place)

    def card(self) -> Card | None:
        """What the soup is, unless it is of strangers' models."""
        return read_card(self.path) if (self.path / CARD_NAME).is_file() else None

    def weights(self, name: str) -> Weights:
        """A file of weights, not yet open."""
        return Weights([self.path / name], None if self._far is None else self._far.read)

    def read(self, name: str) -> bytes:
        """A whole file, which is small."""
        path = self.path / name
        return path.read_bytes() if self._far is None else b"".join(self._pieces(self._far, path))

    def sha256(self, name: str) -> str:
        """Hex sha256 of a file; empty where it is missing."""
        path = self.path / name
        if not path.is_file():
            return ""
        if self._far is None:
            return sha256_file(path)
        digest = hashlib.sha256()
        for piece in self._pieces(self._far, path):
            digest.update(piece)
        return digest.hexdigest()

    def sha256_folder(self) -> str:
        """Hex sha256 of the whole folder, as runs record it."""
        return sha256_named({name: self.sha256(name) for name in self.names()})

    def _pieces(self, far: Far, path: Path) -> Iterator[bytes]:
        size, at = path.stat().st_size, 0
        while at < size:
            piece = memoryview(bytearray(min(size - at, _PIECE_BYTES)))
            if not (count := far.read(path, at, piece)):
                raise Refused(f"{path.name} of {self.place} became shorter while it was read")
            yield bytes(piece[:count])
            at += count


Claim = Callable[[Place], None]
"""Told of a place elsewhere before anything is put there."""


@contextmanager
def replacing_home(place: Place, claim: Claim | None = None) -> Iterator[tuple[Home, Path]]:
    """A soup's place while nobody else may change it, and an empty folder that becomes it.

    What stands there stays until the block ends, and after any error in it.
    """
    if not is_uri(place):
        with replacing(Path(place), alone=True) as fresh:
            yield Home(place), fresh
        return
    uri = str(place).rstrip("/")
    check_uri(uri)  # before anything is written there
    if uri.endswith(WEIGHTS_SUFFIX):
        raise UsageError(f"{place} is a file's name", allowed="a folder's, as a soup is one")
    storage = Storage(uri)
    with ExitStack() as stack:
        try:
            # A web server may take files, and let two writers take one lock.
            if uri.partition("://")[0] in ("http", "https"):
                raise NotImplementedError
            still_ours = stack.enter_context(exclusive(storage))
        except NotImplementedError as error:
            raise Refused(
                f"Nothing can be written at {place}",
                allowed="a local folder, or a store that takes files",
            ) from error
        fresh = stack.enter_context(_scratch(uri))
        yield Home(place), fresh
        if claim is not None:
            claim(place)
        _put(fresh, storage.patient(), still_ours)


def recovered(place: Place) -> None:
    """Clear away what killed writers left on this disk; put back what they had set aside."""
    if is_uri(place):
        _clear(str(place).rstrip("/"))
    else:
        recover(Path(place))


@contextmanager
def _scratch(uri: str) -> Iterator[Path]:
    """A folder for a soup that goes elsewhere; those of writers who were killed at it are gone."""
    _clear(uri)
    with tempfile.TemporaryDirectory(prefix=_prefix(uri)) as folder, locked(Path(folder)):
        yield Path(folder)


def _clear(uri: str) -> None:
    for left in Path(tempfile.gettempdir()).glob(f"{_prefix(uri)}*"):
        with suppress(BlockingIOError, PermissionError), locked(left):
            drop(left)


def _prefix(uri: str) -> str:
    return f"atoll-soup-{hashlib.sha256(uri.encode()).hexdigest()[:16]}-"


def _put(folder: Path, storage: Storage, still_ours: Callable[[], None]) -> None:
    """Put a soup's folder in the place of what is there; others' files stay as they are."""
    size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
    with progress(f"putting {storage.uri}", size, in_bytes=True) as advance:
        storage.put_folder(
            folder,
            check=still_ours,
            advance=advance,
            ours=lambda name: name.startswith(f"{STATE}/"),
            recipe=RECIPE_NAME,
        )
