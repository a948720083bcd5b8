"""Keys and stores that the store's tests share."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from accel.store import EngineKey, EngineStore

GRAPH, WEIGHTS = "a" * 64, "b" * 64


def key(**changes: Any) -> EngineKey:
    """A decoder's key, with some fields changed."""
    fields: dict[str, Any] = {
        "graph": GRAPH,
        "weights": WEIGHTS,
        "target": "rtx",
        "library_version": "1.7.1.116",
        "sm": ("sm86", "sm89"),
        "variant": "fp16",
        "passes": "1",
        "optimization_level": 3,
        "capacity": 512,
        "profiles": {"prefill": {"input_ids": ((1, 1), (1, 64), (4, 128)), "past": ((1,), (2,), (3,))}, "decode": {}},
        "flags": {"tf32": True, "depth": 2},
        "plugins": {"p": "c" * 64, "q": "d" * 64},
    }
    return EngineKey(**{**fields, **changes})


@dataclass(frozen=True)
class Place:
    """A store's address, and what is needed to open it; each test has its own."""

    url: str
    cache: Path
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def is_local(self) -> bool:
        return "://" not in self.url

    def open(self, cache: Path | None = None, **settings: Any) -> EngineStore:
        return EngineStore(self.url, cache=cache or self.cache, options=self.options, **settings)


class Files:
    """A store's files, read and altered past the store."""

    def __init__(self, place: Place) -> None:
        import fsspec

        self.fs, self.root = fsspec.core.url_to_fs(place.url, **place.options)

    def named(self, ending: str) -> list[str]:
        self.fs.invalidate_cache()
        return [str(path) for path in self.fs.find(self.root) if path.endswith(ending)]

    def alter(self, ending: str, change: Any) -> None:
        """Rewrites the one file of this ending."""
        (path,) = self.named(ending)
        self.fs.pipe_file(path, change(self.fs.cat_file(path)))

    def remove(self, ending: str) -> None:
        (path,) = self.named(ending)
        self.fs.rm_file(path)


def start(code: str, *arguments: object) -> subprocess.Popen[str]:
    """A Python process that runs ``code``; it reads and writes text."""
    command = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parents[2]
    )


def flip(content: bytes) -> bytes:
    """One bit of the middle byte is another."""
    middle = len(content) // 2
    return content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]
