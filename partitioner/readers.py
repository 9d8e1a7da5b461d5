"""Corpora on any fsspec filesystem -> rows, streamed.

Parquet (a file, or a folder of them): pictures as binary, or as the struct of `bytes` and `path`
that Hugging Face `datasets` writes. Image folders: `metadata.jsonl` or `metadata.csv` with
`file_name` and a caption. Nothing of a row is trusted; paths inside rows are never followed out of
the corpus.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
import posixpath
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq

from atoll.core.errors import DataError, UsageError, did_you_mean
from atoll.partitioner.settings import PartitionConfig

IMAGE_NAMES = ("image", "img", "picture", "jpg", "jpeg", "png", "webp")
FILE_NAMES = ("file_name", "filename", "file", "path", "image")
CAPTION_NAMES = ("caption", "text", "prompt", "description", "txt")
LABEL_NAMES = ("label", "class", "category")
OWNER_NAMES = ("owner",)
METADATA_NAMES = ("metadata.jsonl", "metadata.csv")
_BATCH_ROWS = 256
_PIECE_BYTES = 1 << 22


@dataclass(frozen=True)
class Row:
    """One example as found; `where` is for the person who has to look at it, never for a file."""

    where: str
    image: bytes
    caption: str
    label: str | None
    owner: str | None


@dataclass(frozen=True)
class Source:
    """A corpus that was found and whose columns are known: `read()` streams its rows."""

    uri: str
    rows: int
    read: Callable[[], Iterator[Row]]


@dataclass(frozen=True)
class _Names:
    """Which column is which."""

    image: str
    caption: str
    label: str | None
    owner: str | None


def open_source(uri: str, config: PartitionConfig) -> Source:
    """Find out what a corpus is. `DataError` when there is none or it has no captions."""
    fs, path = _filesystem(uri)
    if fs.isfile(path):
        if not path.endswith(".parquet"):
            raise DataError(
                f"{uri} is not a corpus", allowed="a .parquet file, or a folder", cure=_SHAPES
            )
        return _parquet(fs, uri, [path], config)
    names = sorted(str(name) for name in fs.find(path))
    tables = [name for name in names if name.endswith(".parquet")]
    if tables:
        return _parquet(fs, uri, tables, config)
    metadata: dict[str, str] = {}
    for kind in METADATA_NAMES:  # of two in one folder, the first kind counts
        for name in names:
            if posixpath.basename(name) == kind:
                metadata.setdefault(posixpath.dirname(name), name)
    if metadata:
        return _folder(fs, uri, sorted(metadata.values()), config)
    if names:
        raise DataError(
            f"{uri} holds {len(names)} files and no captions", allowed=_SHAPES,
            cure="write metadata.jsonl with a line {\"file_name\": ..., \"caption\": ...} per file",
        )  # fmt: skip
    raise DataError(f"{uri} is empty", allowed=_SHAPES)


_SHAPES = "Parquet with image and caption columns, or a folder with metadata.jsonl or metadata.csv"


def source_sha256(uri: str) -> str:
    """Hex sha256 of a corpus's files, wherever it lies: of contents and relative names."""
    fs, path = _filesystem(uri)
    if fs.isfile(path):
        return _file_sha256(fs, path)
    names = sorted(str(name) for name in fs.find(path))
    prefix = len(posixpath.commonpath([path, *names])) + 1 if names else 0
    lines = [f"{_file_sha256(fs, name)}  {name[prefix:]}\n" for name in names]
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def _file_sha256(fs: Any, path: str) -> str:
    digest = hashlib.sha256()
    with fs.open(path, "rb") as file:
        while piece := file.read(_PIECE_BYTES):
            digest.update(piece)
    return digest.hexdigest()


def _filesystem(uri: str) -> tuple[Any, str]:
    try:
        fs, path = fsspec.core.url_to_fs(uri)
        found = fs.exists(path)
    except (ValueError, ImportError, OSError) as error:
        raise DataError(
            f"The corpus {uri} cannot be opened ({error})",
            allowed="a local path, or a URI whose fsspec package is installed",
        ) from error
    if not found:
        raise DataError(f"There is no corpus at {uri}", allowed=_SHAPES)
    return fs, str(path).rstrip("/")


# -- columns -------------------------------------------------------------------------------------


def _choose(
    given: str | None, usual: Sequence[str], available: Sequence[str], option: str
) -> str | None:
    """The column to use: the one given, else the first of the usual names that is there."""
    if given is not None:
        if given not in available:
            raise UsageError(
                f"The corpus has no column '{given}' for {option}. "
                f"{did_you_mean(given, available)}".strip(),
                allowed=", ".join(available),
            )
        return given
    folded = {name.lower(): name for name in reversed(available)}
    return next((folded[name] for name in usual if name in folded), None)


def _names(
    uri: str, config: PartitionConfig, available: Sequence[str], image: str | None
) -> _Names:
    columns = config.columns
    if image is None:
        raise DataError(
            f"{uri} has no column of pictures", allowed=", ".join(available),
            cure="say which it is with --set columns.image=NAME",
        )  # fmt: skip
    caption = _choose(columns.caption, CAPTION_NAMES, available, "columns.caption")
    if caption is None:
        raise DataError(
            f"{uri} has no column of captions", allowed=", ".join(available),
            cure="say which it is with --set columns.caption=NAME",
        )  # fmt: skip
    owner = (
        _choose(config.by, (), available, "--by")
        if config.by_owner
        else _choose(columns.owner, OWNER_NAMES, available, "columns.owner")
    )
    label = _choose(columns.label, LABEL_NAMES, available, "columns.label")
    return _Names(image, caption, label, owner)


def _text(value: Any) -> str:
    """Clean text; lone surrogates, which JSON can carry and Parquet cannot, are replaced."""
    return "" if value is None else str(value).encode("utf-8", "replace").decode().strip()


def _row(where: str, image: bytes, values: dict[str, Any], names: _Names) -> Row:
    label = _text(values.get(names.label)) if names.label else ""
    owner = _text(values.get(names.owner)) if names.owner else ""
    return Row(where, image, _text(values.get(names.caption)), label or None, owner or None)


# -- Parquet -------------------------------------------------------------------------------------


def _holds_bytes(kind: Any) -> bool:
    if pa.types.is_struct(kind):
        return any(field.name == "bytes" and _holds_bytes(field.type) for field in kind.fields)
    return bool(pa.types.is_binary(kind) or pa.types.is_large_binary(kind))


def _parquet(fs: Any, uri: str, paths: list[str], config: PartitionConfig) -> Source:
    rows, schema = 0, None
    for path in paths:
        with _readable(path), fs.open(path, "rb") as file:
            table = pq.ParquetFile(file)
            rows += table.metadata.num_rows
            schema = schema or table.schema_arrow
    assert schema is not None
    pictures = [field.name for field in schema if _holds_bytes(field.type)]
    image = _choose(config.columns.image, IMAGE_NAMES, schema.names, "columns.image")
    if config.columns.image is None and image not in pictures:
        image = pictures[0] if len(pictures) == 1 else None
    names = _names(uri, config, schema.names, image)
    if names.image not in pictures:
        raise DataError(
            f"Column '{names.image}' of {uri} holds {schema.field(names.image).type}, not pictures",
            allowed="binary, or a struct with bytes",
        )
    kind = schema.field(names.caption).type
    if pa.types.is_nested(kind) or _holds_bytes(kind):
        raise DataError(f"Column '{names.caption}' of {uri} holds {kind}, not captions")
    return Source(uri, rows, lambda: _parquet_rows(fs, paths, names))


def _parquet_rows(fs: Any, paths: list[str], names: _Names) -> Iterator[Row]:
    wanted = [name for name in (names.image, names.caption, names.label, names.owner) if name]
    wanted = list(dict.fromkeys(wanted))
    for path in paths:
        with fs.open(path, "rb") as file:
            number = 0
            for batch in _batches(path, file, wanted):
                for values in batch:
                    image = values[names.image]
                    data = image.get("bytes") if isinstance(image, dict) else image
                    where = f"{posixpath.basename(path)} row {number}"
                    yield _row(where, data or b"", values, names)
                    number += 1


def _batches(path: str, file: Any, wanted: list[str]) -> Iterator[list[dict[str, Any]]]:
    with _readable(path):
        table = pq.ParquetFile(file)
        missing = sorted(set(wanted) - set(table.schema_arrow.names))
        if missing:
            raise DataError(f"{path} lacks the column '{missing[0]}' that the first file has")
        batches = table.iter_batches(batch_size=_BATCH_ROWS, columns=wanted)
    while True:
        with _readable(path):
            batch = next(batches, None)
            rows = [] if batch is None else batch.to_pylist()
        if batch is None:
            return
        yield rows


@contextmanager
def _readable(path: str) -> Iterator[None]:
    """Turn what pyarrow says of a damaged file into an error that names the file."""
    try:
        yield
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise DataError(
            f"{path} is not readable Parquet ({reason})",
            cure="restore the file, or leave it out of the corpus",
        ) from error


# -- image folders -------------------------------------------------------------------------------


def _folder(fs: Any, uri: str, tables: list[str], config: PartitionConfig) -> Source:
    entries: list[tuple[str, dict[str, Any]]] = []
    for path in tables:
        text = fs.cat_file(path).decode("utf-8-sig", "replace")
        read = _json_lines if path.endswith(".jsonl") else _csv_lines
        entries += [(posixpath.dirname(path), values) for values in read(path, text)]
    if not entries:
        raise DataError(f"{uri} is empty: its metadata names no pictures")
    available = list(dict.fromkeys(name for _, values in entries for name in values))
    image = _choose(config.columns.image, FILE_NAMES, available, "columns.image")
    names = _names(uri, config, available, image)
    files = [_inside(folder, values.get(names.image)) for folder, values in entries]
    pairs = list(zip(files, (values for _, values in entries), strict=True))
    return Source(uri, len(pairs), lambda: _folder_rows(fs, pairs, names))


def _folder_rows(
    fs: Any, pairs: Iterable[tuple[str, dict[str, Any]]], names: _Names
) -> Iterator[Row]:
    for path, values in pairs:
        try:
            data = bytes(fs.cat_file(path))
        except OSError:  # listed with the unreadable ones, which have a limit of their own
            data = b""
        yield _row(_text(values[names.image]), data, values, names)


def _inside(folder: str, name: Any) -> str:
    parts = str(name or "").split("/")
    if not name or any(part in ("", "..") for part in parts) or "\\" in str(name):
        raise DataError(
            f"The metadata in {folder} names '{name}', which is not a file inside the corpus",
            allowed="relative names with '/' and without '..'",
        )
    return f"{folder}/{posixpath.normpath(str(name))}"


def _json_lines(path: str, text: str) -> Iterator[dict[str, Any]]:
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            values = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise DataError(f"{path} line {number} is not JSON ({error})") from error
        if not isinstance(values, dict):
            raise DataError(f"{path} line {number} is not a JSON object")
        yield values


def _csv_lines(path: str, text: str) -> Iterator[dict[str, Any]]:
    try:
        for values in csv.DictReader(io.StringIO(text, newline="")):
            yield {name: value for name, value in values.items() if name is not None}
    except csv.Error as error:
        raise DataError(f"{path} is not readable CSV ({error})") from error
