"""Keys are read with clear errors, and a signature is good for one message and one key."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from accel.errors import EngineStoreError, RefusedEngineError
from accel.store.signing import HmacKey, Signer, Verifier, read_signer, read_verifier

PEM = serialization.Encoding.PEM
PKCS8 = serialization.PrivateFormat.PKCS8


def private_pem(key: Ed25519PrivateKey | ec.EllipticCurvePrivateKey, password: bytes | None = None) -> bytes:
    how = serialization.BestAvailableEncryption(password) if password else serialization.NoEncryption()
    return key.private_bytes(PEM, PKCS8, how)


def public_pem(key: Ed25519PrivateKey) -> bytes:
    return key.public_key().public_bytes(PEM, serialization.PublicFormat.SubjectPublicKeyInfo)


def ed25519_pair(folder: Path) -> tuple[Signer, Verifier]:
    key = Ed25519PrivateKey.generate()
    (folder / "key.pem").write_bytes(private_pem(key))
    (folder / "key.pub").write_bytes(public_pem(key))
    return read_signer(str(folder / "key.pem")), read_verifier(str(folder / "key.pub"))


def hmac_pair(folder: Path) -> tuple[Signer, Verifier]:
    (folder / "key.hex").write_text(os.urandom(32).hex() + "\n")
    return read_signer(str(folder / "key.hex")), read_verifier(str(folder / "key.hex"))


@pytest.mark.parametrize("pair", [ed25519_pair, hmac_pair])
def test_a_signature_is_good_for_one_message_and_key(tmp_path: Path, pair: object) -> None:
    assert callable(pair)
    signer, verifier = pair(tmp_path)
    signature = signer.sign(b"message")
    verifier.verify(b"message", signature, "here")
    with pytest.raises(RefusedEngineError, match="does not match"):
        verifier.verify(b"massage", signature, "here")
    for value in ("", "zz", "é", signature.value[:-2], signature.value + "00"):
        with pytest.raises(RefusedEngineError, match="does not match"):
            verifier.verify(b"message", dataclasses.replace(signature, value=value), "here")
    _, stranger = pair(tmp_path)
    with pytest.raises(RefusedEngineError, match=f"by key '{signer.key_id}'; this store trusts"):
        stranger.verify(b"message", signature, "here")
    forged = dataclasses.replace(signature, key_id=stranger.key_id)
    with pytest.raises(RefusedEngineError, match="does not match"):
        stranger.verify(b"message", forged, "here")


def test_algorithms_do_not_mix(tmp_path: Path) -> None:
    (signer, _), (_, verifier) = hmac_pair(tmp_path), ed25519_pair(tmp_path)
    with pytest.raises(RefusedEngineError, match="is 'hmac-sha256'; this store checks 'ed25519'"):
        verifier.verify(b"m", signer.sign(b"m"), "here")


def test_keys_from_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ENGINE_KEY", "ab" * 32)
    message = b"message"
    read_verifier("env:ENGINE_KEY").verify(message, HmacKey(b"\xab" * 32).sign(message), "here")
    monkeypatch.setenv("ENGINE_KEY", public_pem(Ed25519PrivateKey.generate()).decode())
    assert read_verifier("env:ENGINE_KEY").algorithm == "ed25519"
    monkeypatch.delenv("ENGINE_KEY")
    with pytest.raises(EngineStoreError, match="'ENGINE_KEY' holds no key"):
        read_verifier("env:ENGINE_KEY")


def rsa_like() -> bytes:
    return private_pem(ec.generate_private_key(ec.SECP256R1()))


@pytest.mark.parametrize(
    ("content", "match"),
    [
        (b"", "is empty"),
        (b"secret!", "neither hex digits.*nor PEM"),
        (b"ab" * 16, "has 16 bytes; 32 are needed"),
        (b"-----BEGIN PRIVATE KEY-----\nAAAA\n-----END PRIVATE KEY-----", "no readable key"),
        (b"-----BEGIN PUBLIC KEY-----\n", "no readable key"),
        (rsa_like(), "another kind than ed25519"),
        (private_pem(Ed25519PrivateKey.generate(), b"password"), "encrypted"),
    ],
)
def test_malformed_keys(tmp_path: Path, content: bytes, match: str) -> None:
    path = tmp_path / "key"
    path.write_bytes(content)
    with pytest.raises(EngineStoreError, match=match) as info:
        read_verifier(str(path))
    assert info.value.remedy
    assert not content or content.decode() not in str(info.value)


def test_a_public_key_cannot_sign_and_a_missing_file(tmp_path: Path) -> None:
    ed25519_pair(tmp_path)
    with pytest.raises(EngineStoreError, match="public key cannot sign"):
        read_signer(str(tmp_path / "key.pub"))
    with pytest.raises(EngineStoreError, match="cannot be read"):
        read_signer(str(tmp_path / "none"))
