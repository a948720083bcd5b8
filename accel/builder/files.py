"""Small files that make later builds faster or their end known: timing caches and a history of seconds."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from accel.engines.tensorrt.adapter import Flavour
from accel.errors import StorageError
from accel.storage import as_storage_error, replace_file

SEPARATOR = "; "  # of a build's key and its details


class TimingCaches:
    """Timings of kernels, a file for each flavour, version and SM. RTX times nothing: for it there is no file.

    Args:
        folder: Made when something is written.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def load(self, flavour: Flavour, sms: Sequence[str]) -> bytes | None:
        """What earlier builds timed, empty at first; None where the flavour has no timing cache."""
        if flavour.cache_kind != "timing":
            return None
        try:
            return self._path(flavour, sms).read_bytes()
        except FileNotFoundError:
            return b""

    def save(self, flavour: Flavour, sms: Sequence[str], data: bytes | None) -> None:
        """Stores what a build gave back; None: nothing to store.

        Raises:
            StorageError: The folder cannot be written to.
        """
        if data is not None:
            write_atomically(self._path(flavour, sms), data)

    def _path(self, flavour: Flavour, sms: Sequence[str]) -> Path:
        return self._folder / f"{flavour.target}-{flavour.version}-{'+'.join(sms)}.timing"


class History:
    """Seconds that each phase of a build took, by a key such as target and layers. A damaged file counts as none.

    Beside the key there are details, the more telling ones first: of builds with the key, that with the same details
    counts, else the one whose details agree most, the latest of equals.
    """

    def __init__(self, path: Path) -> None:
        self._path = path

    def seconds(self, key: str, details: Sequence[str] = ()) -> dict[str, float]:
        """Of the latest build most like this one; empty: there was none with that key."""
        known = self._read()
        alike = [(_agreement(name, details), place, name) for place, name in enumerate(known) if _key_of(name) == key]
        found = known[max(alike)[2]] if alike else {}
        return {name: float(value) for name, value in found.items() if isinstance(value, (int, float))}

    def record(self, key: str, seconds: Mapping[str, float], details: Sequence[str] = ()) -> None:
        """Replaces what is known for a key with these details.

        Raises:
            StorageError: The file cannot be written.
        """
        rounded = {name: round(value, 3) for name, value in seconds.items()}
        name, known = SEPARATOR.join((key, *details)), self._read()
        known.pop(name, None)  # the latest stands last
        write_atomically(self._path, json.dumps({**known, name: rounded}, indent=1).encode())

    def _read(self) -> dict[str, dict[str, float]]:
        try:
            data = json.loads(self._path.read_bytes())
        except (OSError, ValueError):
            return {}
        return {k: v for k, v in data.items() if isinstance(v, dict)} if isinstance(data, dict) else {}


def _key_of(name: str) -> str:
    return name.split(SEPARATOR, 1)[0]


def _agreement(name: str, details: Sequence[str]) -> tuple[bool, ...]:
    """Which details are the same."""
    known = name.split(SEPARATOR)[1:]
    return tuple(place < len(known) and known[place] == detail for place, detail in enumerate(details))


def write_atomically(path: Path, data: bytes) -> None:
    """Writes a file so that a reader sees the old or the new one whole.

    Raises:
        StorageError: The folder is full, read-only or not there to be made.
    """
    try:
        replace_file(path, data)
    except OSError as error:
        if isinstance(error, FileExistsError):  # mkdir says so of a file in the folder's place
            error = NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(path.parent))
        raise as_storage_error(error, path.parent.absolute()) or StorageError(
            f"Cannot write: {error}", where=str(path), remedy="Check the folder"
        ) from error


__all__ = ["History", "TimingCaches", "write_atomically"]
