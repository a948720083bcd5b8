"""What a warm-up job asks for: YAML or a mapping -> frozen dataclasses -> single engines."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from accel.engine_request import split_sms
from accel.engines.tensorrt.adapter import Compatibility
from accel.errors import InputError, RecipeError
from accel.recipe import read_yaml
from accel.schema import from_dict
from accel.sizes import parse_size

LEVEL = 3  # of optimization, where nothing is said
Profiles = dict[str, dict[str, dict[str, int]]]
Target = Literal["tensorrt", "rtx", "cuda", "ort-cuda"]
WARMED = ("cuda", "ort-cuda")  # they compile on the machine that they run on: only their graph is made beforehand
ANY_SM = "any"  # of those


@dataclass(frozen=True, kw_only=True)
class EngineSettings:
    """What a job says of its engines, and what ``defaults`` says for all jobs. Every list means an engine for each.

    Attributes:
        target: ``tensorrt`` or ``rtx``, whose engines are built; ``cuda`` or ``ort-cuda``, which compile where they
            run: their graph is added to the bundle, and they are warmed up where there is a GPU.
        sm: ``auto`` (this machine's GPU), or names such as ``sm86``.
        precision: ``auto`` (what the bundle has, fp16 first), ``fp32``, ``fp16``, ``bf16``, or a
            variant with fewer bits, such as ``w4g32``, ``w8a8`` or ``fp8``.
        capacity: Cache positions per row; encoders have no cache and leave it aside.
        workspace: Scratch memory that a layer may take, e.g. ``4GB``.
        max_batch, profiles, optimization_level, refittable, hardware_compatibility: As in ``accel.build``.
    """

    target: Target | tuple[Target, ...] = "tensorrt"
    sm: str | int | tuple[str | int, ...] = "auto"
    precision: str | tuple[str, ...] = "auto"
    capacity: int | tuple[int, ...] | None = None
    max_batch: int | None = None
    profiles: Profiles | None = None
    optimization_level: int = LEVEL
    workspace: int | str | None = None
    refittable: bool = False
    hardware_compatibility: Compatibility = "none"


@dataclass(frozen=True, kw_only=True)
class Job(EngineSettings):
    """Engines of one bundle, or of several; paths are relative to the jobs file."""

    bundle: str | tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class JobFile:
    """A whole job.

    Attributes:
        defaults: Taken where a job says nothing.
        store: Where engines are kept: a directory (relative to the jobs file) or URL.
        max_bytes: Size that the store may have, e.g. ``200GB``; None: ``ACCEL_STORE_MAX_BYTES``, else no limit. The
            least recently used engines go first.
        memory: What all builds together may take, e.g. ``16GB``; None: what this machine has free.
        workers: Most builds at a time; None: one per core.
        summary: File that the plan, and in the end the report, is written to, as JSON.
        logs: Folder for the logs of the builds; None: a temporary one, which is kept if an engine fails.
    """

    defaults: EngineSettings = EngineSettings()
    jobs: tuple[Job, ...]
    store: str | None = None
    max_bytes: int | str | None = None
    memory: int | str | None = None
    workers: int | None = None
    summary: str | None = None
    logs: str | None = None


@dataclass(frozen=True)
class Wanted:
    """One engine as asked for: an absolute path, ``workspace`` in bytes, the rest as in ``EngineSettings``."""

    bundle: str
    target: Target
    sm: str
    precision: str
    capacity: int | None
    max_batch: int | None
    profiles: Profiles | None
    optimization_level: int
    workspace: int | None
    refittable: bool
    hardware_compatibility: Compatibility

    def title(self, precision: str | None) -> str:
        """For people. ``precision``: what ``auto`` came to; None: as asked for."""
        name = f"{Path(self.bundle).name} {self.target} {self.sm} {precision or self.precision}"
        return f"{name} {self.choices}".rstrip()

    @property
    def choices(self) -> str:
        """Whatever else tells one engine of a bundle from another, in words; what is the default is not said."""
        workspace = None if self.workspace is None else f"{self.workspace / 1e6:.0f} MB"
        given = {"capacity": self.capacity, "max_batch": self.max_batch, "workspace": workspace}
        parts = [f"{name} {value}" for name, value in given.items() if value is not None]
        parts += [_profile_text(name, ranges) for name, ranges in (self.profiles or {}).items()]
        parts += [f"level {self.optimization_level}"] if self.optimization_level != LEVEL else []
        parts += ["refittable"] if self.refittable else []
        parts += [self.hardware_compatibility] if self.hardware_compatibility != "none" else []
        return ", ".join(parts)

    def for_any_gpu(self, encoder: bool) -> tuple[Wanted, str | None]:
        """Of a ``WARMED`` target: without what only a build, or a cache, has a use for, and what was given of that."""
        unused: dict[str, Any] = {
            "sm": "auto", "profiles": None, "optimization_level": LEVEL, "workspace": None, "refittable": False,
            "hardware_compatibility": "none", **({"capacity": None} if encoder else {}),
        }  # fmt: skip
        given = [name for name, default in unused.items() if getattr(self, name) not in (default, ANY_SM)]
        note = f"{self.target} has no use for {', '.join(given)}" if given else None
        return replace(self, **{**unused, "sm": ANY_SM}), note

    def asked(self) -> dict[str, Any]:
        """The keyword arguments of ``accel.engine_request.settle``."""
        names = ("profiles", "precision", "capacity", "max_batch", "optimization_level", "workspace", "refittable")
        return {name: getattr(self, name) for name in (*names, "hardware_compatibility")}


def read_jobs(source: str | Path | Mapping[str, Any]) -> tuple[JobFile, Path]:
    """Reads a job.

    Args:
        source: A YAML file, or what it would hold.

    Returns:
        The job, and the folder that its paths are relative to (of a mapping: the current one).

    Raises:
        RecipeError: The file cannot be read, or has an unknown key or a value of the wrong type.
        InputError: It asks for nothing.
    """
    if isinstance(source, Mapping):
        data, where, folder = dict(source), "the given mapping", Path.cwd()
    else:
        path = Path(source)
        if path.suffix not in (".yaml", ".yml"):
            raise RecipeError(
                "A jobs file ends in .yaml or .yml", where=str(path), remedy="Check the path, or rename it"
            )
        data, where, folder = read_yaml(path, "jobs file"), str(path), path.absolute().parent
    file = from_dict(JobFile, _with_defaults(data), where, error=RecipeError)
    if not file.jobs:
        raise InputError("There are no jobs", where=f"{where}: jobs", remedy="Name a bundle, a target and its SMs")
    for index, job in enumerate(file.jobs):
        for name in ("bundle", "target", "sm", "precision", "capacity"):
            if getattr(job, name) == ():
                remedy = "Give a value, or leave the key out"
                raise InputError("The list is empty", where=f"{where}: jobs[{index}]: {name}", remedy=remedy)
    return file, folder


def expand(file: JobFile, folder: Path) -> list[Wanted]:
    """Every single engine that a job asks for, each once, in the job's order.

    Raises:
        RecipeError: A workspace that is no size.
    """
    found: list[Wanted] = []
    for job in file.jobs:
        given = job.workspace
        workspace = None if given is None else parse_size(given, "workspace", least=1, error=RecipeError)
        choices = (job.bundle, job.target, job.precision, job.capacity, split_sms(job.sm))
        for bundle, target, precision, capacity, sm in itertools.product(*map(_many, choices)):
            wanted = Wanted(
                str(folder / bundle), target, sm, precision, capacity, job.max_batch, job.profiles,
                job.optimization_level, workspace, job.refittable, job.hardware_compatibility,
            )  # fmt: skip
            if wanted not in found:
                found.append(wanted)
    return found


def _profile_text(name: str, ranges: Mapping[str, Mapping[str, int]]) -> str:
    """Such as ``prefill 1 x 1-256 (64)``: in brackets an ``opt`` below the most. Nothing of it is checked yet."""
    sizes = []
    for axis in ranges.values():
        least, opt, most = (axis.get(key) for key in ("min", "opt", "max"))
        sizes.append(str(most) if least == most else f"{least}-{most}" + ("" if opt == most else f" ({opt})"))
    return f"{name} {' x '.join(sizes)}"


def _with_defaults(data: dict[str, Any]) -> dict[str, Any]:
    """Lays each job over the defaults; whatever has the wrong type stays, to be named by its place."""
    defaults, jobs = data.get("defaults", {}), data.get("jobs")
    if not isinstance(defaults, Mapping) or not isinstance(jobs, (list, tuple)):
        return data
    return {**data, "jobs": [{**defaults, **job} if isinstance(job, Mapping) else job for job in jobs]}


def _many(value: Any) -> tuple[Any, ...]:
    return value if isinstance(value, tuple) else (value,)


__all__ = ["ANY_SM", "WARMED", "EngineSettings", "Job", "JobFile", "Wanted", "expand", "read_jobs"]
