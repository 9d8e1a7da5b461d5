"""One folder on any fsspec filesystem, and the only way anything is read from or written to a run.

A file appears under its final name complete or not at all: locally through a temporary name, fsync
and rename; on object stores a put is atomic, and `publish` uploads a folder's marker file last.
`create` is exclusive (If-None-Match on S3, generation match on GCS), which is all that fencing and
the ledger need. Names are relative posix strings; nothing leads out of the root.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import tempfile
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import fsspec
from fsspec.implementations.local import LocalFileSystem

from atoll.core.disk import (
    drop,
    follow_umask,
    fsync,
    no_space_is_failure,
    recover,
    replacing,
    temporary_file,
)
from atoll.core.errors import DataError, Refused

# Uploaded last, in this order: a published folder is there when its last one of these is.
MARKERS = ("config.json", "atoll.json", "shard.json", "model_index.json")
_CREATING = threading.Lock()


def sha256_file(path: Path) -> str:
    """Hex sha256 of one local file, read in pieces."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sha256_folder(path: Path, names: Iterable[str] | None = None) -> str:
    """Hex sha256 over the sorted `sha256  relative/name` lines of the files below a local folder.

    The same text as `sha256sum` prints, so that a stranger can recompute it with coreutils. `names`
    are the files that count where it is not all of them.
    """
    files = path.rglob("*") if names is None else (path / name for name in names)
    return sha256_named(
        {file.relative_to(path).as_posix(): sha256_file(file) for file in files if file.is_file()}
    )


def sha256_named(digests: Mapping[str, str]) -> str:
    """What `sha256_folder` gives for files of these names and digests."""
    lines = (f"{sha256}  {name}\n" for name, sha256 in sorted(digests.items()))
    return hashlib.sha256("".join(lines).encode()).hexdigest()


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
        self._staged: tempfile.TemporaryDirectory[str] | None = None

    def __repr__(self) -> str:
        return f"Storage({self.uri!r})"

    def scoped(self, *, read: Iterable[str], write: Iterable[str]) -> Storage:
        """A handle on the same root that reads and writes only below the given names."""
        write = tuple(write)
        return Storage(self.uri, read=(*read, *write), write=write)

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
        return bool(self._fs.exists(self._path(name)))

    def list(self, prefix: str = "") -> list[str]:
        """The files below `prefix`, sorted, named relative to the root; temporary ones left out."""
        path = self._path(prefix)
        if not self._fs.exists(path):
            return []
        root = self._fs._strip_protocol(self._root).rstrip("/") + "/"
        found = (str(file)[len(root) :] for file in self._fs.find(path))
        return sorted(name for name in found if not any(p[:1] == "." for p in name.split("/")))

    # -- files ---------------------------------------------------------------------------------

    def read_bytes(self, name: str) -> bytes:
        """The whole file; FileNotFoundError when there is none."""
        return bytes(self._fs.cat_file(self._path(name)))

    def read_ranges(self, ranges: Sequence[tuple[str, int, int]]) -> Sequence[bytes]:
        """The bytes `start` to `end - 1` of each (name, start, end), asked for all at once."""
        paths = [self._path(name) for name, _, _ in ranges]
        starts, ends = [start for _, start, _ in ranges], [end for _, _, end in ranges]
        return [bytes(b) for b in self._fs.cat_ranges(paths, starts, ends, on_error="raise")]

    def read_json(self, name: str) -> Any:
        """Parsed JSON; `Refused` when the file is not JSON."""
        try:
            return json.loads(self.read_bytes(name))
        except (ValueError, RecursionError) as error:
            raise Refused(
                f"{self.uri}/{name} is not readable JSON ({error})",
                cure="restore the file from a copy; nothing was changed",
            ) from error

    def write_bytes(self, name: str, data: bytes) -> None:
        """Replace the file: complete or not at all."""
        path = self._path(name, write=True)
        with no_space_is_failure(name):
            if not self.is_local:
                self._in_folder(path, lambda: self._fs.pipe_file(path, data))
                return
            with temporary_file(Path(path)) as temporary:
                temporary.write_bytes(data)
                fsync(temporary)
                os.replace(temporary, path)
                fsync(Path(path).parent)

    def write_json(self, name: str, value: Any) -> None:
        """Replace a JSON file, in the one canonical layout."""
        self.write_bytes(name, canonical_json(value))

    @contextlib.contextmanager
    def writing(self, name: str) -> Iterator[Path]:
        """A local path to write a large file at; it becomes `name` when the block ends well."""
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
                self._in_folder(path, lambda: self._fs.put_file(str(made), path))

    def create(self, name: str, data: bytes) -> None:
        """Create the file, complete and exclusively; FileExistsError when it is already there."""
        path = self._path(name, write=True)
        with no_space_is_failure(name):
            if not self.is_local:
                # `memory://` looks and writes in two steps, between which a thread may come.
                with _CREATING:
                    self._create_afar(name, path, data)
                return
            # A link is exclusive and shows the whole content at once; open("xb") shows a torn one.
            with temporary_file(Path(path)) as temporary:
                temporary.write_bytes(data)
                fsync(temporary)
                os.link(temporary, path)
                fsync(Path(path).parent)

    def _create_afar(self, name: str, path: str, data: bytes) -> None:
        # Nobody looks first whether it is there: the store alone can say so, and whether it does
        # is what a probe finds out. Not open("xb"), which s3fs lets replace a file by an empty one.
        try:
            self._in_folder(path, lambda: self._fs.pipe_file(path, data, mode="create"))
        except OSError as error:
            # Some stores say no more than that a condition did not hold.
            if self._fs.exists(path):
                raise FileExistsError(name) from error
            raise

    def _in_folder(self, path: str, write: Callable[[], object]) -> None:
        """Write; where a folder is missing, make it and write again.

        Not the other way round: object stores have none and would be asked for their bucket, which
        credentials for a prefix of it do not cover.
        """
        try:
            write()
        except FileNotFoundError:
            self._fs.makedirs(os.path.dirname(path), exist_ok=True)
            write()

    def append_line(self, name: str, line: str) -> None:
        """Append a line to a journal. Journals are observations: a torn last line is skipped."""
        path = self._path(name, write=True)

        def append() -> None:
            with self._fs.open(path, "ab") as file:
                file.write(line.encode() + b"\n")

        with no_space_is_failure(name):
            self._in_folder(path, append)

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
        if self.is_local and name:
            recover(Path(path))  # first: it may put back what a killed writer had set aside
        if self._fs.exists(path):
            self._fs.rm(path, recursive=True)

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
            place = Path(self._staged.name) / file
            place.parent.mkdir(parents=True, exist_ok=True)
            place.write_bytes(self.read_bytes(file))
        if not files:
            raise FileNotFoundError(name)
        return target

    @contextlib.contextmanager
    def writing_folder(self, name: str) -> Iterator[Path]:
        """A local folder to fill; it is published as `name` when the block ends well.

        Locally it lies beside its place under a hidden name: what a killed writer leaves stays
        inside the run, and goes with the next writer or with a removal.
        """
        path = Path(self._path(name, write=True))
        with no_space_is_failure(name):
            if self.is_local:
                with replacing(path) as fresh:
                    yield fresh
                return
            with tempfile.TemporaryDirectory(prefix="atoll-") as scratch:
                yield Path(scratch)
                self.publish(Path(scratch), name)

    def publish(self, folder: Path, name: str) -> None:
        """Make a local folder appear at `name`, whole; what stood there before is replaced."""
        self._path(name, write=True)  # refused before anything is read
        with no_space_is_failure(name):
            if self.is_local:
                with self.writing_folder(name) as fresh:
                    shutil.copytree(folder, fresh, dirs_exist_ok=True)
                return
            files = [file for file in sorted(folder.rglob("*")) if file.is_file()]
            for marker in reversed(MARKERS):
                self.remove(f"{name}/{marker}")  # and removed first
            self.remove(name)
            for file in sorted(files, key=_marks):
                self.write_bytes(f"{name}/{file.relative_to(folder).as_posix()}", file.read_bytes())

    def sha256(self, name: str) -> str:
        """Hex sha256 of a file, or of a folder as `sha256_folder` defines it."""
        path = self.local(name)
        return sha256_folder(path) if path.is_dir() else sha256_file(path)


def _marks(file: Path) -> int:
    return MARKERS.index(file.name) if file.name in MARKERS else -1


def canonical_json(value: Any) -> bytes:
    """The one layout of JSON on disk: sorted keys, two spaces, a final newline."""
    return (json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False) + "\n").encode()
