"""Signatures of engines: an engine is code, and runs with the rights of the process that loads it.

A signature covers the manifest, which holds the plan's sha256, and so covers the plan. Either HMAC-SHA256 (whoever may
load may also sign) or ed25519 (a build machine signs with the private key, servers hold the public one).
"""

from __future__ import annotations

import hashlib
import hmac
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from accel.errors import DependencyError, EngineStoreError, RefusedEngineError

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

MIN_SECRET_BYTES = 32
MAX_KEY_BYTES = 64 << 10
REMEDY = (
    "Make an HMAC key with 'openssl rand -hex 32', or an ed25519 pair with "
    "'openssl genpkey -algorithm ed25519 -out key.pem' and 'openssl pkey -in key.pem -pubout -out key.pub'"
)


@dataclass(frozen=True)
class Signature:
    """``value`` is hex; ``key_id`` tells keys apart in messages and is not trusted."""

    algorithm: str
    key_id: str
    value: str


class Verifier(Protocol):
    """Checks signatures."""

    algorithm: str
    key_id: str

    def verify(self, message: bytes, signature: Signature, where: str) -> None:
        """Returns if ``signature`` is this key's over ``message``.

        Raises:
            RefusedEngineError: It is not.
        """


class Signer(Verifier, Protocol):
    """Makes signatures, and checks them."""

    def sign(self, message: bytes) -> Signature:
        """The signature over ``message``."""


class HmacKey:
    """HMAC-SHA256 with a shared secret.

    Raises:
        EngineStoreError: The secret is shorter than 32 bytes.
    """

    algorithm = "hmac-sha256"

    def __init__(self, secret: bytes) -> None:
        if len(secret) < MIN_SECRET_BYTES:
            what = f"The HMAC key has {len(secret)} bytes; {MIN_SECRET_BYTES} are needed"
            raise EngineStoreError(what, remedy=REMEDY)
        self._secret = secret
        self.key_id = hmac.digest(secret, b"accel key id", "sha256").hex()[:16]

    def sign(self, message: bytes) -> Signature:
        return Signature(self.algorithm, self.key_id, hmac.digest(self._secret, message, "sha256").hex())

    def verify(self, message: bytes, signature: Signature, where: str) -> None:
        _check_origin(self, signature, where)
        if not hmac.compare_digest(_from_hex(signature.value), hmac.digest(self._secret, message, "sha256")):
            raise _refusal("does not match", where)


class Ed25519Verifier:
    """Checks ed25519 signatures with the public key."""

    algorithm = "ed25519"

    def __init__(self, key: Ed25519PublicKey) -> None:
        self._public = key
        self.key_id = hashlib.sha256(key.public_bytes_raw()).hexdigest()[:16]

    def verify(self, message: bytes, signature: Signature, where: str) -> None:
        from cryptography.exceptions import InvalidSignature

        _check_origin(self, signature, where)
        try:
            self._public.verify(_from_hex(signature.value), message)
        except InvalidSignature:
            raise _refusal("does not match", where) from None


class Ed25519Signer(Ed25519Verifier):
    """Signs with an ed25519 private key."""

    def __init__(self, key: Ed25519PrivateKey) -> None:
        super().__init__(key.public_key())
        self._private = key

    def sign(self, message: bytes) -> Signature:
        return Signature(self.algorithm, self.key_id, self._private.sign(message).hex())


def read_verifier(source: str) -> Verifier:
    """Reads a key that checks signatures: an HMAC key, or an ed25519 public (or private) key.

    Args:
        source: A file's path, or ``env:NAME`` for an environment variable. The content is an HMAC key as hex digits
            (64 at least), or an ed25519 key as PEM.

    Raises:
        EngineStoreError: It cannot be read or is malformed. The message never holds the key.
        DependencyError: An ed25519 key without the package ``cryptography``.
    """
    where, text = _read(source)
    if text.startswith(b"-----BEGIN "):
        return _read_pem(text, where)
    try:
        secret = bytes.fromhex(text.decode("ascii"))
    except ValueError:
        what = "The key is neither hex digits (HMAC) nor PEM (ed25519)"
        raise EngineStoreError(what, where=where, remedy=REMEDY) from None
    try:
        return HmacKey(secret)
    except EngineStoreError as error:
        raise EngineStoreError(error.what, where=where, remedy=error.remedy) from None


def read_signer(source: str) -> Signer:
    """Reads a key that signs: an HMAC key, or an ed25519 private key; ``source`` as in ``read_verifier``.

    Raises:
        EngineStoreError: As ``read_verifier``, or the key is a public one.
        DependencyError: As ``read_verifier``.
    """
    key = read_verifier(source)
    if isinstance(key, (HmacKey, Ed25519Signer)):
        return key
    remedy = "Give the private key where engines are built; the public key only checks"
    raise EngineStoreError("A public key cannot sign", where=source, remedy=remedy)


def _read(source: str) -> tuple[str, bytes]:
    if source.startswith("env:"):
        name = source.removeprefix("env:")
        value = os.environ.get(name, "").strip()
        if not value:
            remedy = "Set it to the key, or give a key file"
            raise EngineStoreError(f"The environment variable {name!r} holds no key", remedy=remedy)
        return source, os.fsencode(value)
    if source.startswith("-----BEGIN ") or re.fullmatch(r"[0-9a-fA-F]{32,}", source.strip()):
        what = "The key itself was given where its place is wanted"  # and is not repeated: logs are read by many
        raise EngineStoreError(what, remedy="Write it to a file and give its path, or give env:NAME")
    path = Path(source).expanduser()
    try:
        with path.open("rb") as stream:
            text = stream.read(MAX_KEY_BYTES).strip()
    except OSError as error:
        what = f"The key file cannot be read: {error.strerror}"
        raise EngineStoreError(what, where=str(path), remedy="Check the path and its permissions") from error
    if not text:
        raise EngineStoreError("The key file is empty", where=str(path), remedy=REMEDY)
    return str(path), text


def _read_pem(text: bytes, where: str) -> Ed25519Verifier:
    try:
        from cryptography.exceptions import UnsupportedAlgorithm
        from cryptography.hazmat.primitives import serialization
        from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
    except ImportError as error:
        remedy = "pip install 'accelrt[store]', or use an HMAC key"
        raise DependencyError("ed25519 keys need the package 'cryptography'", where=where, remedy=remedy) from error
    try:
        if b"PRIVATE KEY" in text.splitlines()[0]:
            private = serialization.load_pem_private_key(text, password=None)
            if isinstance(private, Ed25519PrivateKey):
                return Ed25519Signer(private)
        else:
            public = serialization.load_pem_public_key(text)
            if isinstance(public, Ed25519PublicKey):
                return Ed25519Verifier(public)
    except TypeError:
        what = "The private key is encrypted, and nobody could be asked for its password"
        raise EngineStoreError(what, where=where, remedy="Give a key without a password") from None
    except (ValueError, UnsupportedAlgorithm):
        raise EngineStoreError("The PEM holds no readable key", where=where, remedy=REMEDY) from None
    raise EngineStoreError("The PEM holds a key of another kind than ed25519", where=where, remedy=REMEDY)


def _check_origin(key: Verifier, signature: Signature, where: str) -> None:
    """A better message than "does not match" where the reason is known; decides nothing by itself."""
    if signature.algorithm != key.algorithm:
        raise _refusal(f"is {signature.algorithm!r}; this store checks {key.algorithm!r}", where)
    if signature.key_id != key.key_id:
        raise _refusal(f"is by key {signature.key_id!r}; this store trusts {key.key_id!r}", where)


def _from_hex(value: str) -> bytes:
    try:
        return bytes.fromhex(value)
    except ValueError:
        return b""  # no signature, so it does not match


def _refusal(problem: str, where: str) -> RefusedEngineError:
    remedy = "Build the engine again, or give the key it was signed with"
    return RefusedEngineError(f"The engine's signature {problem}", where=where, remedy=remedy)


__all__ = [
    "Ed25519Signer",
    "Ed25519Verifier",
    "HmacKey",
    "Signature",
    "Signer",
    "Verifier",
    "read_signer",
    "read_verifier",
]
