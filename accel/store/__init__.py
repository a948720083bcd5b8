"""The engine store: keys, hashes, signatures, and engines kept in directories and object stores."""

from accel.store.hashing import HashCache, cache_folder
from accel.store.key import EngineKey, engine_identity
from accel.store.manifest import EngineManifest
from accel.store.signing import HmacKey, read_signer, read_verifier
from accel.store.store import EngineStore, Entry, StoredEngine

__all__ = [
    "EngineKey",
    "EngineManifest",
    "EngineStore",
    "Entry",
    "HashCache",
    "HmacKey",
    "StoredEngine",
    "cache_folder",
    "engine_identity",
    "read_signer",
    "read_verifier",
]
