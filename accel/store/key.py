"""What makes an engine the engine it is. The bytes of an engine never count: builds are not deterministic."""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import dataclass, field
from typing import Any

from accel.errors import AccelError, InputError
from accel.schema import from_dict, to_dict
from accel.store.hashing import is_sha256

Shape = tuple[int, ...]
ShapeRange = tuple[Shape, Shape, Shape]  # min, opt, max
Flag = str | int | float | bool

SM_NAME = re.compile(r"sm[0-9]{2,3}[a-z]?")


@dataclass(frozen=True)
class EngineKey:
    """Everything that changes an engine: two builds with equal keys may stand in for each other.

    Attributes:
        graph: sha256 of the lowered graph file without its weights.
        weights: sha256 of the weights (``HashCache.combined`` for several files). Apart from ``graph``, so that an
            engine whose weights can be refitted is found by its graph alone.
        target: The flavour, e.g. ``tensorrt`` or ``rtx``: neither loads the other's plans.
        library_version: Its full version: plans do not load in another one.
        sm: Names of the GPU architectures it is built for, e.g. ``("sm86", "sm89")``; kept sorted and unique.
        variant: The bundle's variant, which is the precision that the graph is written in.
        passes: Version of the lowering and of the repairs after parsing: they may change a network whose
            graph file is the same.
        optimization_level: The builder's effort: other tactics, another speed.
        capacity: Static cache positions per row of a decoder; None where there is no cache.
        profiles: Profile name -> input -> (min, opt, max) shape. Order means nothing: index profiles by sorted name.
        gpu: Name of the GPU whose timings chose the tactics; None if built without one.
        cuda: Version of the CUDA libraries the tactics came from, if they did.
        workspace_bytes: Limit on scratch memory, which rules tactics out; None: the library's own limit.
        refittable: Plans that keep their weights replaceable lose optimisations.
        flags: Further builder settings by name, e.g. ``{"tf32": True}``.
        plugins: Name -> sha256 of each plugin library: its kernels are part of the engine.

    Raises:
        InputError: A hash, SM name or profile is malformed.
    """

    graph: str
    weights: str
    target: str
    library_version: str
    sm: tuple[str, ...]
    variant: str
    passes: str
    optimization_level: int
    capacity: int | None = None
    profiles: dict[str, dict[str, ShapeRange]] = field(default_factory=dict)
    gpu: str | None = None
    cuda: str | None = None
    workspace_bytes: int | None = None
    refittable: bool = False
    flags: dict[str, Flag] = field(default_factory=dict)
    plugins: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        object.__setattr__(self, "sm", tuple(sorted(set(self.sm))))
        for name, value in {"graph": self.graph, "weights": self.weights, **self.plugins}.items():
            if not is_sha256(value):
                raise InputError(f"{value!r} is no sha256", where=f"EngineKey.{name}", remedy="Give 64 hex digits")
        for name in self.sm:
            if not SM_NAME.fullmatch(name):
                raise InputError(f"{name!r} names no SM", where="EngineKey.sm", remedy="Write it as 'sm89'")
        if not self.sm:
            raise InputError("No SM is given", where="EngineKey.sm", remedy="Name at least one, e.g. 'sm89'")
        for profile, inputs in self.profiles.items():
            for name, shapes in inputs.items():
                if len(shapes) != 3 or len({len(shape) for shape in shapes}) != 1:
                    what, where = "A range is not three shapes of one rank", f"profile {profile!r}, input {name!r}"
                    raise InputError(what, where=where, remedy="Give (min, opt, max)")

    @property
    def digest(self) -> str:
        """Hex sha256 over every field: the engine's name in a store."""
        return _digest(to_dict(self))

    @property
    def identity(self) -> str:
        """``engine_identity`` of this key: the folder its engine lies in."""
        return engine_identity(self.graph, self.weights, self.target, self.library_version, self.variant)

    def __hash__(self) -> int:
        return hash(self.digest)


def engine_identity(graph: str, weights: str, target: str, library_version: str, variant: str) -> str:
    """Hex sha256 over what a runtime knows before it chooses among engines.

    The engines of one variant of a bundle for one flavour and version share it and lie in one folder. SMs, profiles,
    capacity and the builder's settings are left out: the runtime lists the folder and takes the engine that fits.
    """
    parts = {"graph": graph, "weights": weights, "target": target, "version": library_version, "variant": variant}
    return _digest(parts)


def read_key(data: object, where: str, error: type[AccelError]) -> EngineKey:
    """The key that ``to_dict`` wrote.

    Raises:
        error: An unknown or missing field, a value of the wrong type, or a malformed one.
    """
    try:
        return from_dict(EngineKey, data, where, error=error)
    except InputError as problem:
        raise error(problem.what, where=where, remedy=problem.remedy) from problem


def canonical_json(data: Any) -> bytes:
    """The one way to write plain data: sorted keys, no spaces, ASCII.

    Raises:
        ValueError: NaN or infinity, which JSON has not.
        TypeError: Something that is no plain data.
    """
    return json.dumps(data, sort_keys=True, separators=(",", ":"), allow_nan=False).encode("ascii")


def _digest(data: Any) -> str:
    return hashlib.sha256(canonical_json(data)).hexdigest()


__all__ = ["EngineKey", "Flag", "Shape", "ShapeRange", "canonical_json", "engine_identity", "read_key"]
