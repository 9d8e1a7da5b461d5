"""Signatures of certificates: Ed25519 (RFC 8032) over the certificate's bytes, in a file beside it.

The private key is in the environment and nowhere else. A signature is the 64 bytes and nothing
more, so that openssl checks it too:

    openssl pkeyutl -verify -rawin -pubin -inkey signer.pem -in certificate.json \
        -sigfile certificate.sig
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING

from atoll.core.errors import ConfigError, MissingError, Refused, UsageError
from atoll.core.ledger import SIGNING_KEY

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

BYTES = 64

Sign = Callable[[bytes], bytes]


def signature_name(certificate: str) -> str:
    """The file that holds a certificate's signature, beside it."""
    return str(PurePosixPath(certificate).with_suffix(".sig"))


def signer() -> Sign | None:
    """What signs with the key in the environment; None where there is none.

    `ConfigError` for what is no unencrypted Ed25519 key in PEM; of its content nothing is said.
    """
    text = os.environ.get(SIGNING_KEY)
    if text is None:
        return None
    _check_library()
    from cryptography.exceptions import UnsupportedAlgorithm
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
    from cryptography.hazmat.primitives.serialization import load_pem_private_key

    try:
        key: object = load_pem_private_key(text.encode(), password=None)
    except (ValueError, TypeError, UnsupportedAlgorithm):  # of a password or the like
        key = None
    if not isinstance(key, Ed25519PrivateKey):
        # Without the cause: it could quote what it could not read.
        raise ConfigError(
            f"{SIGNING_KEY} holds no key that can sign",
            allowed="an Ed25519 private key in PEM, without a password",
            cure="make one with `openssl genpkey -algorithm ed25519`",
        ) from None
    return key.sign


def read_signer(file: str) -> Ed25519PublicKey:
    """The public key in a PEM file, of `openssl pkey -pubout`."""
    _check_library()
    from cryptography.exceptions import UnsupportedAlgorithm
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
    from cryptography.hazmat.primitives.serialization import load_pem_public_key

    try:
        key: object = load_pem_public_key(Path(file).read_bytes())
    except OSError as error:
        raise UsageError(f"{file} cannot be read: {error.strerror}") from error
    except (ValueError, UnsupportedAlgorithm):
        key = None
    if not isinstance(key, Ed25519PublicKey):
        raise UsageError(
            f"{file} is no public key of a signer",
            allowed="an Ed25519 public key in PEM",
            cure="make it from the private one with `openssl pkey -pubout`",
        )
    return key


def check_signature(content: bytes, signature: bytes, key: Ed25519PublicKey) -> None:
    """`Refused` unless the key's owner signed just this."""
    from cryptography.exceptions import InvalidSignature

    try:
        key.verify(signature, content)
    except InvalidSignature:
        raise Refused("it was changed after it was signed, or somebody else signed it") from None


def _check_library() -> None:
    if importlib.util.find_spec("cryptography") is None:
        raise MissingError(
            "Signatures need the package cryptography", cure="pip install 'atoll[sign]'"
        )
