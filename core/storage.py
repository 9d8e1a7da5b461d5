"""One folder on any fsspec filesystem, and the only way anything is read from or written to a run.

Whoever has time asks a patient handle, which rides out the store's outages (`core/outage.py`). A
file appears under its final name complete or not at all: locally through a temporary name, fsync
and rename; on object stores a put is atomic, and `publish` uploads a folder's marker file last.
`create` is exclusive (If-None-Match on S3, generation match on GCS), which is all that fencing and
the ledger need. Names are relative posix strings; nothing leads out of the root.
"""

from __future__ import annotations

import contextlib
import copy
import itertools
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import fsspec
import fsspec.callbacks
from fsspec.implementations.local import LocalFileSystem

from atoll.core.digest import canonical_json, sha256_file, sha256_folder
from atoll.core.disk import (
    drop,
    follow_umask,
    fsync,
    no_space_is_failure,
    recover,
    replacing,
    sweep,
    temporary_file,
)
from atoll.core.errors import DataError, Failed, Refused
from atoll.core.filesystems import create_alone, files_below, in_folder, is_there
from atoll.core.outage import PATIENCE_SECONDS, Patience

T = TypeVar("T")

# Uploaded last, in this order: a published folder is there when its last one of these is.
MARKERS = ("config.json", "atoll.json", "shard.json", "model_index.json")
# Where errors come from that are not of a store's client.
_OURS = ("builtins", "atoll", "safetensors", "torch")


class Storage:
    """A folder named by a path or any fsspec URI, optionally scoped to parts of itself.

    A scoped handle raises `PermissionError` outside the names it was given: what an island holds.
    """

    def __init__(
        self,
        uri: str | Path,
        *,
        read: Iterable[str] | None = None,
        write: Iterable[str] | None = None,
    ) -> None:
        self.uri = str(uri).rstrip("/")
        try:
            # A cached listing would hide a newer generation from the writer that it fences.
            self._fs, root = fsspec.core.url_to_fs(self.uri, use_listings_cache=False)
        except (ValueError, ImportError) as error:
            raise DataError(
                f"'{uri}' is not a place that fsspec can open ({error})",
                cure="give a local path or a URI whose fsspec package is installed",
            ) from error
        self._root = str(root).rstrip("/")
        self.is_local = isinstance(self._fs, LocalFileSystem)
        self._read = None if read is None else tuple(read)
        self._write = None if write is None else tuple(write)
        self._patience: Patience | None = None
        self._staged: tempfile.TemporaryDirectory[str] | None = None

    def __repr__(self) -> str:
        return f"Storage({self.uri!r})"

    def scoped(self, *, read: Iterable[str], write: Iterable[str]) -> Storage:
        """A handle on the same root that reads and writes only below the given names."""
        handle = self._another()
        handle._write = tuple(write)
        handle._read = (*read, *handle._write)
        return handle

    def patient(
        self, *, seconds: float = PATIENCE_SECONDS, leave: Callable[[], bool] = lambda: False
    ) -> Storage:
        """The same handle, whose requests are made again while the store is away or has no room.

        Each raises `Failed` when that has lasted for so many seconds, and `Interrupted` when
        `leave()` says so meanwhile. What the store answers is never asked again: no such file, a
        file that is there already, no permission.
        """
        handle = self._another()
        handle._patience = Patience(seconds, leave)
        return handle

    def _another(self) -> Storage:
        handle = copy.copy(self)
        handle._staged = None  # each stages for itself, and clears away with itself
        return handle

    # -- requests ------------------------------------------------------------------------------

    def _ask(self, what: str, request: Callable[[], T]) -> T:
        """The answer to a request, when there is one; a client's own kind of error is `Failed`."""

        def asked() -> T:
            try:
                return request()
            except Exception as error:
                kind = type(error)
                if isinstance(error, OSError) or kind.__module__.partition(".")[0] in _OURS:
                    raise
                raise Failed(
                    f"{self.uri} does not answer, {what}: {kind.__name__}: {error}",
                    cure="check the place and its credentials, and run the same command again",
                ) from error

        return self._ride_out(what, asked)

    def _ride_out(self, what: str, work: Callable[[], T]) -> T:
        return work() if self._patience is None else self._patience.ride_out(what, work)

    # -- names ---------------------------------------------------------------------------------

    def _path(self, name: str, *, write: bool = False) -> str:
        parts = name.split("/") if name else []
        if name.startswith("/") or any(part in ("", ".", "..") for part in parts):
            raise Refused(
                f"'{name}' is not a name inside a run", allowed="relative names without '..'"
            )
        scope = self._write if write else self._read
        if scope is not None and not any(
            name == allowed or name.startswith(f"{allowed}/") for allowed in scope
        ):
            verb = "write" if write else "read"
            raise PermissionError(f"this handle may not {verb} {name!r}; it may: {sorted(scope)}")
        return f"{self._root}/{name}" if name else self._root

    def exists(self, name: str) -> bool:
        """Whether a file or folder of that name is there."""
        path = self._path(name)
        return self._ask(f"looking for {name}", lambda: is_there(self._fs, path))

    def list(self, prefix: str = "") -> list[str]:
        """The files below `prefix`, sorted, named relative to the root; temporary ones left out."""
        path = self._path(prefix)
        root = self._fs._strip_protocol(self._root).rstrip("/") + "/"
        found = self._ask(f"listing {prefix}", lambda: [*files_below(self._fs, path)])
        names = (str(file)[len(root) :] for file in found)
        return sorted(name for name in names if not any(p[:1] == "." for p in name.split("/")))

    # -- files ---------------------------------------------------------------------------------

    def read_bytes(self, name: str) -> bytes:
        """The whole file; FileNotFoundError when there is none."""
        path = self._path(name)
        return self._ask(f"reading {name}", lambda: bytes(self._fs.cat_file(path)))

    def size(self, name: str) -> int:
        """Of a file, in bytes; FileNotFoundError when there is none."""
        path = self._path(name)
        return self._ask(f"looking for {name}", lambda: int(self._fs.size(path)))

    def read_ranges(self, ranges: Sequence[tuple[str, int, int]]) -> Sequence[bytes]:
        """The bytes `start` to `end - 1` of each (name, start, end), asked for all at once."""
        paths = [self._path(name) for name, _, _ in ranges]
        starts, ends = [start for _, start, _ in ranges], [end for _, _, end in ranges]
        names = {name for name, _, _ in ranges}
        found = self._ask(
            f"reading {names.pop() if len(names) == 1 else f'{len(names)} files'}",
            lambda: self._fs.cat_ranges(paths, starts, ends, on_error="raise"),
        )
        return [bytes(data) for data in found]

    def read_json(self, name: str) -> Any:
        """Parsed JSON; `Refused` when the file is not JSON."""
        try:
            return json.loads(self.read_bytes(name))
        except (ValueError, RecursionError) as error:
            raise Refused(
                f"{self.uri}/{name} is not readable JSON ({error})",
                cure="restore the file from a copy; nothing was changed",
            ) from error

    def write_bytes(
        self, name: str, data: bytes, *, check: Callable[[], None] = lambda: None
    ) -> None:
        """Replace the file: complete or not at all. `check` raises where it is not to be any more.

        It is asked first, and on a disk last too: a process may be frozen for minutes while that
        takes the data. A store's put cannot be held back once it is on its way.
        """
        path = self._path(name, write=True)

        def put() -> None:
            check()
            self._fs.pipe_file(path, data)

        def write() -> None:
            with no_space_is_failure(name):
                if not self.is_local:
                    in_folder(self._fs, path, put)
                    return
                check()  # whatever room there is: who has lost the place does not wait for any
                with temporary_file(Path(path)) as temporary:
                    temporary.write_bytes(data)
                    fsync(temporary)
                    check()
                    os.replace(temporary, path)
                    fsync(Path(path).parent)

        self._ask(f"writing {name}", write)

    def write_json(
        self, name: str, value: Any, *, check: Callable[[], None] = lambda: None
    ) -> None:
        """Replace a JSON file, in the one canonical layout; `check` as for `write_bytes`."""
        self.write_bytes(name, canonical_json(value), check=check)

    @contextlib.contextmanager
    def writing(self, name: str) -> Iterator[Path]:
        """A local path to write a large file at; it becomes `name` when the block ends well.

        What goes wrong in the block is no request, and not ridden out.
        """
        path = self._path(name, write=True)
        with no_space_is_failure(name):
            if self.is_local:
                with temporary_file(Path(path)) as temporary:
                    yield temporary
                    follow_umask(temporary)
                    fsync(temporary)
                    os.replace(temporary, path)
                    fsync(Path(path).parent)
                return
            with tempfile.TemporaryDirectory(prefix="atoll-") as folder:
                made = Path(folder) / "file"
                yield made
                self.put(made, name)

    def put(
        self,
        file: Path,
        name: str,
        *,
        check: Callable[[], None] = lambda: None,
        advance: Callable[[int], None] = lambda count: None,
    ) -> None:
        """Make a local file appear at `name`, in pieces of which `advance` hears the bytes."""
        path = self._path(name, write=True)
        if self.is_local:
            check()
            with self.writing(name) as place:
                shutil.copyfile(file, place)
            advance(file.stat().st_size)
            return

        heard = _Heard(advance)

        def put() -> None:
            check()
            heard.begin()
            self._fs.put_file(str(file), path, callback=heard)

        with no_space_is_failure(name):
            self._ask(f"writing {name}", lambda: in_folder(self._fs, path, put))

    def create(self, name: str, data: bytes) -> None:
        """Create the file, complete and exclusively; FileExistsError when it is already there.

        Who asks again may find what he has just made himself, and a store's client asks again by
        itself where an answer is lost: afar, and by a patient handle, a file is known by its
        content, which must be of this writer alone where it matters who the creator is.
        """
        path = self._path(name, write=True)
        asked = itertools.count()

        def create() -> None:
            perhaps_ours = next(asked) > 0 or not self.is_local
            try:
                with no_space_is_failure(name):
                    create_alone(self._fs, path, data)
            except FileExistsError:
                if not perhaps_ours or bytes(self._fs.cat_file(path)) != data:
                    raise

        self._ask(f"creating {name}", create)

    def append_line(self, name: str, line: str) -> None:
        """Append a line to a journal. Journals are observations: a torn last line is skipped."""
        path = self._path(name, write=True)
        data = line.encode() + b"\n"
        asked = itertools.count()

        def append() -> None:
            again = next(asked) > 0
            with no_space_is_failure(name):
                there = bytes(self._fs.cat_file(path)) if is_there(self._fs, path) else b""
                if again and there.endswith(data):
                    return  # its answer was lost
                torn = there[-1:] not in (b"", b"\n")
                in_folder(self._fs, path, lambda: write(b"\n" + data if torn else data))

        def write(data: bytes) -> None:
            with self._fs.open(path, "ab") as file:
                file.write(data)

        self._ask(f"writing {name}", append)

    def read_lines(self, name: str) -> Sequence[dict[str, Any]]:
        """The JSON objects of a journal, a line each; torn lines are skipped, no file has none."""
        try:
            text = self.read_bytes(name).decode(errors="replace")
        except (FileNotFoundError, NotADirectoryError):
            return []
        found = []
        for line in text.splitlines():
            with contextlib.suppress(ValueError):
                if isinstance(entry := json.loads(line), dict):
                    found.append(entry)
        return found

    def remove(self, name: str) -> None:
        """Remove a file or a whole folder; one that is not there is fine."""
        path = self._path(name, write=True)

        def remove() -> None:
            if self.is_local and name:
                recover(Path(path))  # first: it may put back what a killed writer had set aside
            try:
                if is_there(self._fs, path):
                    self._fs.rm(path, recursive=True)
            except FileNotFoundError:  # another removes it too
                if is_there(self._fs, path):
                    raise

        self._ask(f"removing {name}", remove)

    # -- folders -------------------------------------------------------------------------------

    def local(self, name: str) -> Path:
        """A local path with the file's or folder's content: itself, or a copy staged from afar."""
        path = self._path(name)
        if self.is_local:
            return Path(path)
        if self._staged is None:
            self._staged = tempfile.TemporaryDirectory(prefix="atoll-staged-")
        target = Path(self._staged.name) / name
        drop(target)  # an earlier copy may hold files that have been removed since
        files = self.list(name)
        for file in files:
            self._ride_out(f"fetching {file}", partial(self._stage, file))
        if not files:
            raise FileNotFoundError(name)
        return target

    def _stage(self, file: str) -> None:
        assert self._staged is not None
        place = Path(self._staged.name) / file
        with no_space_is_failure(str(place)):
            place.parent.mkdir(parents=True, exist_ok=True)
            place.write_bytes(self.read_bytes(file))

    @contextlib.contextmanager
    def writing_folder(
        self, name: str, *, check: Callable[[], None] = lambda: None
    ) -> Iterator[Path]:
        """A local folder to fill; it is published as `name` when the block ends well.

        Locally it lies beside its place under a hidden name: what a killed writer leaves stays
        inside the run, and goes with the next writer or with a removal. `check` raises where the
        writer has lost the right to the place, and is asked before what stands there is touched.
        """
        path = Path(self._path(name, write=True))
        with no_space_is_failure(name):
            if self.is_local:
                with replacing(path, check=check) as fresh:
                    yield fresh
                return
            with tempfile.TemporaryDirectory(prefix="atoll-") as scratch:
                yield Path(scratch)
                self.publish(Path(scratch), name, check=check)

    def write_folder(
        self, name: str, save: Callable[[Path], None], *, check: Callable[[], None] = lambda: None
    ) -> None:
        """`writing_folder` for content that can be made again: `save` is, after every outage."""

        def write() -> None:
            with self.writing_folder(name, check=check) as folder:
                save(folder)

        self._ride_out(f"writing {name}", write)

    def publish(self, folder: Path, name: str, *, check: Callable[[], None] = lambda: None) -> None:
        """Make a local folder appear at `name`, whole; what stood there before is replaced."""
        self._path(name, write=True)  # refused before anything is read
        with no_space_is_failure(name):
            if self.is_local:
                self.write_folder(name, lambda new: _copy(folder, new), check=check)
                return
            self.put_folder(folder, name, check=check)

    def put_folder(
        self,
        folder: Path,
        name: str = "",
        *,
        check: Callable[[], None] = lambda: None,
        advance: Callable[[int], None] = lambda count: None,
        ours: Callable[[str], bool] = lambda name: True,
        recipe: str | None = None,
    ) -> None:
        """Put a local folder's files in the place of those at `name`, one by one, as stores must.

        The markers are away meanwhile, so that nobody takes what a killed writer leaves for whole.
        `recipe` names a file that says how to make it whole: it is put first where there is none
        and is else the last to be replaced. Files of before that are not `ours` stay.
        """
        files = {f.relative_to(folder).as_posix(): f for f in folder.rglob("*") if f.is_file()}
        below = f"{name}/" if name else ""

        def put(file: str) -> None:
            # Asked of each: an upload may hang for longer than it takes an heir to publish.
            self.put(files[file], f"{below}{file}", check=check, advance=advance)

        if recipe is not None and not self.exists(f"{below}{recipe}"):
            put(recipe)
        check()
        for marker in reversed(MARKERS):
            self.remove(f"{below}{marker}")
        in_order = sorted(files, key=lambda file: (file == recipe, _marks(file), file))
        for file in in_order[:-1]:
            put(file)
        # Before that last one is another: whoever is killed here still has it to do.
        for file in (each.removeprefix(below) for each in self.list(name)):
            if file not in files and ours(file):
                check()
                self.remove(f"{below}{file}")
        for file in in_order[-1:]:
            put(file)

    def sweep(self, name: str) -> None:
        """Clear away what killed writers left below a folder; a store keeps nothing of theirs."""
        path = self._path(name, write=True)
        if self.is_local:
            sweep(Path(path))

    def sha256(self, name: str) -> str:
        """Hex sha256 of a file, or of a folder as `sha256_folder` defines it."""
        path = self.local(name)
        return self._ride_out(
            f"reading {name}", lambda: sha256_folder(path) if path.is_dir() else sha256_file(path)
        )


class _Heard(fsspec.callbacks.Callback):  # type: ignore[misc]
    """Tells of the bytes that went out, of each once however often a file is sent."""

    def __init__(self, advance: Callable[[int], None]) -> None:
        super().__init__()
        self._advance = advance
        self._sent = self._told = 0

    def begin(self) -> None:
        """The file is sent from its beginning."""
        self._sent = 0

    def relative_update(self, inc: int = 1) -> None:
        self._sent += inc
        if self._sent > self._told:
            self._advance(self._sent - self._told)
            self._told = self._sent


def _copy(folder: Path, place: Path) -> None:
    shutil.copytree(folder, place, dirs_exist_ok=True)


def _marks(file: str) -> int:
    name = file.rpartition("/")[2]
    return MARKERS.index(name) if name in MARKERS else -1
