"""A stranger's recheck: wherever the run lies, and after one byte was changed in anything."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cli.conftest import SHARD, atoll, done, tree

KINDS = (
    "islands/shard-00/expert/diffusion_pytorch_model.safetensors",
    "islands/shard-00/expert/config.json",
    "islands/shard-00/expert/atoll.json",
    "islands/shard-02/gate_head/model.safetensors",
    "islands/shard-02/gate_head/config.json",
    "base/diffusion_pytorch_model.safetensors",
    "base/config.json",
    "base/atoll.json",
    "encoder/diffusion_pytorch_model.safetensors",
    "encoder/config.json",
    "commons/pack-00000.safetensors",
    "commons/data-00000.parquet",
    "shards/shard-00/pack-00000.safetensors",
    "shards/shard-00/data-00000.parquet",
    "shards/shard-00/shard.json",
    "partition/centroids.safetensors",
    "partition/assignments.parquet",
    "partition/report.html",
    "partition/unreadable.json",
    "partition/atoll.config.json",
    "soups/all/diffusion_pytorch_model.safetensors",
    "soups/all/soup.json",
    "soups/all/atoll.json",
    "soups/all/config.json",
    "ensemble/transformer/experts/shard-00/diffusion_pytorch_model.safetensors",
    "ensemble/transformer/gate/shard-00/config.json",
    "ensemble/transformer/config.json",
    "ensemble/text_encoder/diffusion_pytorch_model.safetensors",
    "ensemble/scheduler/scheduler_config.json",
    "ensemble/model_index.json",
    "ensemble/atoll.json",
    "ledger/000000.json",
    "ledger/000010.json",
)


@pytest.fixture(scope="module")
def removed(made: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run without a shard, and with its certificate."""
    run = tmp_path_factory.mktemp("removed") / "run"
    shutil.copytree(made, run)
    done("unlearn", run, SHARD)
    return run


@pytest.fixture
def kept(removed: Path, tmp_path: Path) -> Path:
    """A copy of it to change."""
    shutil.copytree(removed, tmp_path / "elsewhere/moved")
    return tmp_path / "elsewhere/moved"


def found(target: object) -> str:
    """What a verification that fails says."""
    said = atoll("verify", target, "--json")
    assert said.code == 7, said
    return str(said.error["what"])


def flips(data: bytes) -> Iterator[bytes]:
    """One byte changed: at the start, in the middle and at the end."""
    for place in (0, len(data) // 2, len(data) - 1):
        yield data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :]


def test_a_run_and_its_certificate_hold_wherever_they_lie(made, kept, monkeypatch):
    before = tree(kept)
    checks = done("verify", made)["checks"]
    assert all(check["holds"] for check in checks)
    names = {check["what"] for check in checks}
    for path in ("base", "encoder", "soups/all", "ensemble", "islands/shard-01/gate_head"):
        assert f"{path} has its digest" in names
    certified = done("verify", kept / "certificate.json")
    names = {check["what"] for check in certified["checks"]}
    assert f"nothing of {SHARD} is left" in names
    assert "the ledger holds the removal that the certificate names" in names
    monkeypatch.chdir(kept)
    done("verify", "certificate.json")
    done("verify", ".")
    assert tree(kept) == before


@pytest.mark.parametrize("name", KINDS)
def test_one_byte_changed_in_a_file(kept: Path, name: str) -> None:
    path = kept / name
    original = path.read_bytes()
    owner = name.rsplit("/", 1)[0]
    for changed in flips(original):
        path.write_bytes(changed)
        what = found(kept / "certificate.json")
        if name.startswith("ledger/"):
            assert "ledger" in what
        else:
            assert any(f"{part} has its digest" in what for part in parents(owner)), what
    path.unlink()
    assert "checks failed" in found(kept)


def parents(name: str) -> Iterator[str]:
    while name:
        yield name
        name = name.rpartition("/")[0]


def test_one_byte_changed_in_the_manifest(kept: Path) -> None:
    """Every digit and letter of every value; keys and layout are the reader's to refuse."""
    path = kept / "manifest.json"
    manifest = json.loads(path.read_text())

    def changed(value: object) -> Iterator[object]:
        if isinstance(value, dict):
            for key in value:
                for other in changed(value[key]):
                    yield {**value, key: other}
        elif isinstance(value, bool):
            yield not value
        elif isinstance(value, int):
            yield value + 1
        elif isinstance(value, str):
            yield ("0" if value[0] != "0" else "1") + value[1:]

    unseen = []
    for other in changed(manifest):
        path.write_text(json.dumps(other, indent=2, sort_keys=True) + "\n")
        said = atoll("verify", kept, "-q")
        if said.code != 7:
            unseen.append(
                [key for key in manifest if manifest[key] != other[key]] + [said.code, said.err]
            )
    assert unseen == []


def test_any_word_changed_in_the_certificate(kept: Path) -> None:
    path = kept / "certificate.json"
    certificate = json.loads(path.read_text())
    others = {
        "schema_version": 2, "shard": "shard-00", "records": certificate["records"] + 1,
        "before": {}, "after": {}, "manifest_sha256": "0" * 64, "ledger_sha256": "0" * 64,
        "removal_entry": certificate["removal_entry"] - 1, "rewritten_exports": ["/x"],
        "beyond_reach": [], "recheck": [],
    }  # fmt: skip
    assert set(others) == set(certificate)
    for key, value in others.items():
        path.write_text(json.dumps({**certificate, key: value}))
        assert found(path)
    path.write_text(json.dumps({**certificate, "removal_entry": 999}))
    assert "999" in found(path)
    for text in ("", "{", "[]", "{}", json.dumps({**certificate, "more": 1})):
        path.write_text(text)
        assert found(path)


def test_what_was_taken_out_and_put_back_is_found(made: Path, kept: Path) -> None:
    for name in (
        f"shards/{SHARD}/data-00000.parquet", f"islands/{SHARD}/preview.png",
        f"ensemble/transformer/gate/{SHARD}/config.json",
    ):  # fmt: skip
        (kept / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(made / name, kept / name)
        what = found(kept)
        assert f"nothing of {SHARD} is left" in what
        assert name in what
        (kept / name).unlink()
    rows = kept / "partition/assignments.parquet"
    kept_rows = rows.read_bytes()
    shutil.copy(made / "partition/assignments.parquet", rows)
    assert "rows of partition/assignments.parquet" in found(kept)
    rows.write_bytes(kept_rows)
    done("verify", kept)


def test_a_ledger_cut_short_or_made_longer(kept: Path) -> None:
    entries = sorted((kept / "ledger").iterdir())
    last = entries[-1].read_bytes()
    entries[-1].unlink()
    assert "the certificate names" in found(kept / "certificate.json")
    entries[-1].write_bytes(last)
    shutil.copy(entries[-1], kept / f"ledger/{len(entries):06d}.json")
    assert "ledger is broken" in found(kept)


def test_a_certificate_alone(removed: Path, tmp_path: Path) -> None:
    shutil.copy(removed / "certificate.json", tmp_path / "certificate.json")
    said = atoll("verify", tmp_path / "certificate.json", "--json")
    assert said.code == 2
    assert "lies alone" in said.error["what"]
    assert "fetch the whole run" in said.error["cure"]
    assert atoll("verify", tmp_path / "other.json", "--json").code == 2
