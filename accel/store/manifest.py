"""The manifest beside each plan: plain JSON, written last, so that an entry exists once its manifest does."""

from __future__ import annotations

import dataclasses
import json
import math
from dataclasses import dataclass
from hashlib import sha256
from typing import Any

from accel.errors import InputError, RefusedEngineError
from accel.schema import from_dict, to_dict
from accel.store.hashing import is_sha256
from accel.store.key import EngineKey, canonical_json, read_key
from accel.store.signing import Signature, Signer, Verifier

SCHEMA_VERSION = 1
MAX_MANIFEST_BYTES = 16 << 20
FIELDS = {"schema_version", "key", "size", "sha256", "created", "versions", "facts", "signature"}
CHECKSUM = "checksum"  # of all other fields; older manifests have none
REMEDY = "Build the engine again (accel build, accel warmup), or remove the entry"


@dataclass(frozen=True)
class EngineManifest:
    """What a store knows of one engine.

    Attributes:
        key: What the engine was built from and for.
        size: The plan's bytes.
        sha256: Of the plan.
        created: Seconds since 1970.
        versions: Libraries of the builder, name -> version.
        facts: What the builder measured: plain JSON, not interpreted here.
        signature: Over everything above; None if the store does not sign.
    """

    key: EngineKey
    size: int
    sha256: str
    created: float
    versions: dict[str, str]
    facts: dict[str, Any]
    signature: Signature | None = None

    @property
    def stem(self) -> str:
        """Path of the entry in its store, without endings."""
        return f"{self.key.identity}/{self.key.digest}"

    @property
    def plan(self) -> str:
        """Path of the plan in its store. Its content is part of the name, so a plan is never overwritten by another."""
        return f"{self.stem}-{self.sha256[:16]}.plan"

    def signed(self, signer: Signer) -> EngineManifest:
        """The manifest with the signer's signature."""
        return dataclasses.replace(self, signature=signer.sign(self._message()))

    def check_signature(self, verifier: Verifier, where: str) -> None:
        """Returns if the verifier's key signed this manifest.

        Raises:
            RefusedEngineError: Unsigned, altered, or signed by another key.
        """
        if self.signature is None:
            raise RefusedEngineError("The engine is not signed, and this store requires it", where=where, remedy=REMEDY)
        verifier.verify(self._message(), self.signature, where)

    def encode(self) -> bytes:
        """The JSON file's bytes."""
        data = {"schema_version": SCHEMA_VERSION, **to_dict(self)}
        data[CHECKSUM] = _checksum(data)
        return (json.dumps(data, indent=1, sort_keys=True, allow_nan=False) + "\n").encode("ascii")

    def _message(self) -> bytes:
        data = {"schema_version": SCHEMA_VERSION, **to_dict(self)}
        del data["signature"]
        return canonical_json(data)


def decode(raw: bytes, where: str) -> EngineManifest:
    """Reads a manifest.

    Raises:
        RefusedEngineError: Not JSON, altered since it was written, another schema, a field that is missing, unknown
            or of the wrong type.
    """
    data = _parse(raw, where)
    version = data.get("schema_version")
    if version != SCHEMA_VERSION or type(version) is not int:
        what = f"The manifest has schema version {version!r}; this accel reads version {SCHEMA_VERSION}"
        raise RefusedEngineError(what, where=where, remedy=REMEDY)
    checksum = data.pop(CHECKSUM, None)
    if set(data) != FIELDS:
        what = f"The manifest lacks or does not know: {', '.join(sorted(set(data) ^ FIELDS))}"
        raise RefusedEngineError(what, where=where, remedy=REMEDY)
    if checksum is not None and not _is_unaltered(data, checksum):
        raise RefusedEngineError("The manifest was altered: its checksum differs", where=where, remedy=REMEDY)
    plain = {name: data[name] for name in ("size", "sha256", "created", "versions", "signature")}
    read = from_dict(_Plain, plain, where, error=RefusedEngineError)
    if not isinstance(data["facts"], dict) or read.size < 1 or not is_sha256(read.sha256):
        raise RefusedEngineError("The manifest's facts, size or sha256 are malformed", where=where, remedy=REMEDY)
    key = read_key(data["key"], f"{where}: key", RefusedEngineError)
    return EngineManifest(key, read.size, read.sha256, read.created, read.versions, data["facts"], read.signature)


def _checksum(data: dict[str, Any]) -> str:
    """Finds what a disk or an editor changed; whoever means harm computes it anew, and only a signature helps."""
    return sha256(canonical_json(data)).hexdigest()


def _is_unaltered(data: dict[str, Any], checksum: object) -> bool:
    try:
        return checksum == _checksum(data)
    except RecursionError:  # a little less deep could be read, but not written
        return False


def check_facts(facts: dict[str, Any]) -> dict[str, Any]:
    """``facts`` as it will be read again: tuples become lists.

    Raises:
        InputError: It is not plain JSON.
    """
    try:
        copy = json.loads(canonical_json(facts))
    except (TypeError, ValueError, RecursionError) as error:
        raise InputError(f"The engine's facts are not plain JSON: {error}", where="facts") from error
    assert isinstance(copy, dict)
    return copy


@dataclass(frozen=True)
class _Plain:
    """The fields that need no care of their own."""

    size: int
    sha256: str
    created: float
    versions: dict[str, str]
    signature: Signature | None


def _parse(raw: bytes, where: str) -> dict[str, Any]:
    if len(raw) > MAX_MANIFEST_BYTES:
        raise RefusedEngineError("The manifest is too large to be one", where=where, remedy=REMEDY)
    try:
        text = raw.decode("utf-8")
        data = json.loads(text, object_pairs_hook=_unique, parse_constant=_finite, parse_float=_finite)
    except (ValueError, RecursionError) as error:
        raise RefusedEngineError(f"The manifest is not valid JSON: {error}", where=where, remedy=REMEDY) from error
    if not isinstance(data, dict):
        raise RefusedEngineError("The manifest is no mapping", where=where, remedy=REMEDY)
    return data


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        raise ValueError("a key stands twice")
    return result


def _finite(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):  # NaN, Infinity, 1e999
        raise ValueError(f"{text} is not JSON")
    return number


__all__ = ["EngineManifest", "SCHEMA_VERSION", "check_facts", "decode"]
