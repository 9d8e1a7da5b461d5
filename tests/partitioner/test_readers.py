from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from atoll.core.errors import DataError, UsageError
from atoll.partitioner.readers import Row, open_source, source_sha256
from atoll.partitioner.settings import Columns, PartitionConfig

PLAIN = PartitionConfig(shards=2)


def rows(uri: str | Path, config: PartitionConfig = PLAIN) -> list[Row]:
    source = open_source(str(uri), config)
    found = list(source.read())
    assert source.rows == len(found)
    return found


def folder(path: Path, table: str, text: str, files: dict[str, bytes]) -> Path:
    for name, data in files.items():
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_bytes(data)
    (path / table).parent.mkdir(parents=True, exist_ok=True)
    (path / table).write_text(text)
    return path


def test_parquet_by_usual_names_and_in_the_hugging_face_shape(tmp_path: Path) -> None:
    plain = {"image": [b"a", b"b"], "text": ["x", None], "label": [3, 4], "owner": ["o", None]}
    pq.write_table(pa.table(plain), tmp_path / "plain.parquet")
    assert rows(tmp_path / "plain.parquet") == [
        Row("plain.parquet row 0", b"a", "x", "3", "o"),
        Row("plain.parquet row 1", b"b", "", "4", None),
    ]
    struct = [{"bytes": b"a", "path": "/etc/passwd"}, {"bytes": None, "path": "/etc/passwd"}]
    table = pa.table({"Picture of it": struct, "Caption": [" x ", "y"]})
    pq.write_table(table, tmp_path / "struct.parquet")
    found = rows(tmp_path / "struct.parquet")
    assert [(row.image, row.caption) for row in found] == [(b"a", "x"), (b"", "y")]


def test_a_folder_of_parquet_and_a_remote_one_are_one_corpus(tmp_path: Path) -> None:
    memory = fsspec.filesystem("memory")
    for number in range(2):
        table = pa.table({"image": [b"%d" % number], "caption": ["c"]})
        pq.write_table(table, tmp_path / f"part-{number}.parquet")
        memory.pipe_file(
            f"/readers/part-{number}.parquet",
            (tmp_path / f"part-{number}.parquet").read_bytes(),
        )
    assert [row.image for row in rows(tmp_path)] == [b"0", b"1"]
    assert rows("memory://readers") == rows(tmp_path)
    assert source_sha256("memory://readers") == source_sha256(str(tmp_path))
    one = source_sha256(str(tmp_path / "part-0.parquet"))
    (tmp_path / "part-0.parquet").rename(tmp_path / "moved.parquet")
    assert source_sha256(str(tmp_path / "moved.parquet")) == one


@pytest.mark.parametrize("kind", ["jsonl", "csv"])
def test_image_folders_with_metadata(tmp_path: Path, kind: str) -> None:
    entries = [
        {"file_name": "a.png", "caption": "one, two", "class": "k"},
        {"file_name": "sub/b.png", "caption": "three\nlines", "class": ""},
        {"file_name": "missing.png", "caption": "x", "class": "k"},
    ]
    if kind == "jsonl":
        text = "".join(json.dumps(entry) + "\n\n" for entry in entries)
    else:
        buffer = io.StringIO()
        writer = csv.DictWriter(buffer, ["file_name", "caption", "class"])
        writer.writeheader()
        writer.writerows(entries)
        text = "\ufeff" + buffer.getvalue()
    files = {"train/a.png": b"a", "train/sub/b.png": b"b"}
    found = rows(folder(tmp_path, f"train/metadata.{kind}", text, files))
    assert [(row.where, row.image, row.caption, row.label) for row in found] == [
        ("a.png", b"a", "one, two", "k"),
        ("sub/b.png", b"b", "three\nlines", None),
        ("missing.png", b"", "x", "k"),
    ]


def test_columns_can_be_named_and_a_wrong_name_is_corrected(tmp_path: Path) -> None:
    path = tmp_path / "c.parquet"
    pq.write_table(pa.table({"pic": [b"a"], "story": ["s"], "artist": ["x"]}), path)
    named = PartitionConfig(shards=1, columns=Columns(image="pic", caption="story", owner="artist"))
    assert rows(path, named)[0] == Row("c.parquet row 0", b"a", "s", None, "x")
    by_owner = PartitionConfig(by="artist", columns=Columns(caption="story"))
    assert rows(path, by_owner)[0].owner == "x"
    for wrong in (
        PartitionConfig(by="artists", columns=Columns(caption="story")),
        PartitionConfig(shards=1, columns=Columns(caption="storey")),
    ):
        with pytest.raises(UsageError, match=r"Did you mean '(artist|story)'\?"):
            rows(path, wrong)


def write_bytes(data: bytes) -> Callable[[Path], str]:
    def make(path: Path) -> str:
        (path / "x.parquet").write_bytes(data)
        return str(path / "x.parquet")

    return make


def write_table(**columns: Any) -> Callable[[Path], str]:
    def make(path: Path) -> str:
        pq.write_table(pa.table(columns), path / "x.parquet")
        return str(path / "x.parquet")

    return make


def write_folder(table: str, text: str) -> Callable[[Path], str]:
    return lambda path: str(folder(path, table, text, {"a.png": b"a"}))


def torn(path: Path) -> str:
    data = {"image": [b"x" * 5000] * 50, "caption": ["c"] * 50}
    pq.write_table(pa.table(data), path / "x.parquet", compression="none", use_dictionary=False)
    whole = bytearray((path / "x.parquet").read_bytes())
    whole[4:3000] = b"\xff" * 2996
    (path / "x.parquet").write_bytes(whole)
    return str(path / "x.parquet")


@pytest.mark.parametrize(
    ("make", "what"),
    [
        (lambda path: str(path / "nothing"), "There is no corpus"),
        (lambda path: "nosuch://place/x", "cannot be opened"),
        (lambda path: str(path), "is empty"),
        (write_bytes(b"PAR1 nonsense"), "not readable Parquet"),
        (torn, "not readable Parquet"),
        (write_table(caption=["x"]), "no column of pictures"),
        (write_table(image=["text"], caption=["x"]), "no column of pictures"),
        (write_table(image=[b"x"]), "no column of captions"),
        (write_table(image=[b"x"], caption=[["a", "b"]]), "not captions"),
        (write_folder("readme.txt", "hello"), "no captions"),
        (write_folder("metadata.jsonl", "\n"), "names no pictures"),
        (write_folder("metadata.jsonl", "{"), "line 1 is not JSON"),
        (write_folder("metadata.jsonl", "[" * 100_000), "line 1 is not JSON"),
        (write_folder("metadata.jsonl", "[1]"), "not a JSON object"),
        (write_folder("metadata.jsonl", '{"file_name": "a.png"}'), "no column of captions"),
        (write_folder("metadata.csv", "caption\nx\n"), "no column of pictures"),
        (write_folder("metadata.csv", f'a,b\n"{"x" * 200_000}",y\n'), "not readable CSV"),
    ],
)
def test_what_is_no_corpus_is_a_data_error(
    tmp_path: Path, make: Callable[[Path], str], what: str
) -> None:
    with pytest.raises(DataError, match=what):
        rows(make(tmp_path))


@pytest.mark.parametrize("name", ["../a.png", "/etc/passwd", "b/../../a.png", "", "..\\a.png"])
def test_names_that_lead_out_of_the_corpus_are_refused(tmp_path: Path, name: str) -> None:
    text = json.dumps({"file_name": name, "caption": "x"})
    with pytest.raises(DataError, match="not a file inside the corpus"):
        rows(folder(tmp_path, "metadata.jsonl", text, {"a.png": b"a"}))


def test_lone_surrogates_are_replaced(tmp_path: Path) -> None:
    text = '{"file_name": "a.png", "caption": "x\\ud800y"}'
    found = rows(folder(tmp_path, "metadata.jsonl", text, {"a.png": b"a"}))
    assert found[0].caption == "x?y"
