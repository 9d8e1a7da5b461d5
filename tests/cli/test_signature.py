"""Signatures of certificates, checked by openssl too, and what is wrong with the others."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from tests.cli.conftest import SHARD, atoll, done, tree

OPENSSL = shutil.which("openssl")
pytestmark = pytest.mark.skipif(OPENSSL is None, reason="keys are made by openssl")
KEY = "ATOLL_SIGNING_KEY"
# Of an algorithm (1.3.101.127) that nobody has.
UNKNOWN = """-----BEGIN PRIVATE KEY-----
MC4CAQAwBQYDK2V/BCIEIAABAgMEBQYHCAkKCwwNDg8QERITFBUWFxgZGhscHR4f
-----END PRIVATE KEY-----
"""


def openssl(*arguments: object) -> bytes:
    assert OPENSSL is not None
    command = [OPENSSL, *map(str, arguments)]
    return subprocess.run(command, check=True, capture_output=True).stdout


def key_pair(folder: Path, name: str, algorithm: str = "ed25519") -> tuple[Path, Path]:
    """The files of a private and a public key."""
    private, public = folder / f"{name}.pem", folder / f"{name}.pub.pem"
    openssl("genpkey", "-algorithm", algorithm, "-out", private)
    openssl("pkey", "-in", private, "-pubout", "-out", public)
    return private, public


@pytest.fixture
def fresh(made: Path, tmp_path: Path) -> Path:
    shutil.copytree(made, tmp_path / "run")
    return tmp_path / "run"


def test_a_signed_removal(fresh: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    private, public = key_pair(tmp_path, "ours")
    _, theirs = key_pair(tmp_path, "theirs")
    monkeypatch.setenv(KEY, private.read_text())
    secret = private.read_text().splitlines()[1]
    told = atoll("unlearn", fresh, SHARD, "-vv")
    assert told.code == 0
    assert "(signed)" in told.out
    assert secret not in told.out + told.err
    assert not any(secret.encode() in f.read_bytes() for f in fresh.rglob("*") if f.is_file())
    monkeypatch.delenv(KEY)
    certificate, signature = fresh / "certificate.json", fresh / "certificate.sig"
    openssl(
        "pkeyutl", "-verify", "-rawin", "-pubin", "-inkey", public, "-in", certificate,
        "-sigfile", signature,
    )  # fmt: skip

    checks = done("verify", certificate, "--signer", public)["checks"]
    assert f"certificate.json is signed by {public}" in {check["what"] for check in checks}
    done("verify", fresh)  # where a signature is no stray
    assert "--signer" in atoll("verify", certificate).err
    # Whoever is not trusted, and every changed byte of what was signed or of the signature.
    refused = atoll("verify", certificate, "--signer", theirs, "--json")
    assert refused.code == 7
    assert "somebody else signed it" in refused.error["what"]
    for file in (certificate, signature):
        content = file.read_bytes()
        for place in (0, len(content) // 2, len(content) - 1):
            changed = bytes([content[place] ^ 1])
            file.write_bytes(content[:place] + changed + content[place + 1 :])
            assert atoll("verify", certificate, "--signer", public).code == 7
        file.write_bytes(content)
    done("verify", certificate, "--signer", public)
    # Kept under another name when the next shard leaves, whose certificate nobody signs.
    certificate.rename(fresh / "first.json")
    signature.rename(fresh / "first.sig")
    done("unlearn", fresh, "shard-02")
    assert not signature.exists()
    done("verify", fresh)
    done("verify", fresh / "first.json", "--signer", public)
    unsigned = atoll("verify", certificate, "--signer", public, "--json")
    assert unsigned.code == 7
    assert "certificate.sig is not there" in unsigned.error["what"]
    (fresh / "first.sig").write_bytes(bytes(65))
    assert "first.sig" in atoll("verify", fresh, "--json").error["what"]


def test_a_signature_of_a_removal_before_does_not_stay(
    fresh: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(KEY, key_pair(tmp_path, "ours")[0].read_text())
    done("unlearn", fresh, SHARD)
    monkeypatch.delenv(KEY)
    done("unlearn", fresh, "shard-02")
    assert not (fresh / "certificate.sig").exists()


@pytest.mark.parametrize("kind", ["nonsense", "blank", "x25519", "password", "public", "unknown"])
def test_a_key_that_cannot_sign_is_refused_before_anything_is_touched(
    fresh: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    text = {"blank": " ", "unknown": UNKNOWN}.get(kind, "s3cret nonsense")
    if kind == "password":
        openssl(
            "genpkey", "-algorithm", "ed25519", "-aes256", "-pass", "pass:x",
            "-out", tmp_path / "key.pem",
        )  # fmt: skip
        text = (tmp_path / "key.pem").read_text()
    elif kind in ("x25519", "public"):
        files = key_pair(tmp_path, "key", "x25519" if kind == "x25519" else "ed25519")
        text = files[kind == "public"].read_text()
    before = tree(fresh)
    monkeypatch.setenv(KEY, text)
    said = atoll("unlearn", fresh, SHARD, "--json")
    assert said.code == 3
    assert KEY in said.error["what"]
    assert kind == "blank" or text.splitlines()[min(1, text.count("\n"))] not in said.out + said.err
    assert tree(fresh) == before


def test_a_signer_that_is_none(made: Path, tmp_path: Path) -> None:
    private, public = key_pair(tmp_path, "ours")
    certificate = made / "certificate.json"  # which is not looked at first
    for file in (private, tmp_path / "none.pem", tmp_path):
        said = atoll("verify", certificate, "--signer", file, "--json")
        assert said.code == 2
        assert str(file) in said.error["what"]
    said = atoll("verify", made, "--signer", public, "--json")
    assert said.code == 2
    assert "certificate.json" in said.error["cure"]


def test_without_the_library(fresh: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    monkeypatch.setenv(KEY, "anything")
    said = atoll("unlearn", fresh, SHARD, "--json")
    assert said.code == 5
    assert "atoll[sign]" in said.error["cure"]
