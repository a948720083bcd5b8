"""What ``accel bench`` or a warm-up measured of a bundle on this machine, for loading to take the fastest engine.

One small JSON file per bundle and machine, replaced as a whole by an atomic rename: processes that measure at once
leave the figures of one of them, and nobody reads half a file. A file is named by what its figures hold for (the
machine, its libraries' versions, the threads), so figures of another machine or version are not even looked at; a row
names the content of the graph and weights that it measured, and holds for nothing else.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from accel import __version__
from accel.bundle import Bundle
from accel.capabilities import version_of
from accel.errors import AccelError, StorageError
from accel.machine import available_cores, gpu_models, probe_cpu
from accel.schema import from_dict, to_dict
from accel.storage import as_storage_error, replace_file
from accel.store.hashing import cache_folder

_log = logging.getLogger("accel")
SCHEMA = 1
MAX_BYTES = 1 << 20
Device = Literal["cpu", "cuda"]
# The distributions whose versions decide how fast engines are, by the device that these run on.
DISTRIBUTIONS: dict[Device, tuple[str, ...]] = {
    "cpu": ("onnxruntime", "openvino"),
    "cuda": (
        *("onnxruntime-gpu", "tensorrt", "tensorrt-cu13", "tensorrt-cu12", "tensorrt-rtx-cu13", "tensorrt-rtx-cu12"),
        *("torch", "triton"),
    ),
}


@dataclass(frozen=True)
class Measured:
    """One engine on one variant.

    Attributes:
        engine, variant: Their names.
        graph: ``graph_digest`` of what ran.
        cost: Milliseconds that engines are compared by; ``Measurements.cost`` says of what.
        times: Metric -> median milliseconds.
    """

    engine: str
    variant: str
    graph: str
    cost: float
    times: dict[str, float]


@dataclass(frozen=True)
class Measurements:
    """One run of ``accel bench``: engines measured in interleaved rounds.

    Attributes:
        machine: See ``machine_identity``.
        date: ISO, UTC.
        rounds: Interleaved rounds behind each median.
        cost: What the rows' cost is, in words.
        rows: Those whose graphs the bundle still has, once they come from ``recall``.
        passed_over: Engine, or what of it or of the bundle -> why it was not measured.
    """

    schema: int
    bundle: str
    machine: dict[str, str]
    date: str
    rounds: int
    cost: str
    rows: tuple[Measured, ...]
    passed_over: dict[str, str]


def graph_digest(bundle: Bundle, variant: str, target: str) -> str | None:
    """Names the content of a variant's graph for a target and of its weights; None: the bundle has no such graph."""
    known = bundle.manifest.variants.get(variant)
    if known is None or target not in known.graphs:
        return None
    names = (known.graphs[target].file, *bundle.weights(variant, target))
    return _digest([bundle.manifest.files[name].sha256 for name in names])


def machine_identity(device: Device, threads: int | None) -> dict[str, str]:
    """What figures hold for: processor or GPUs, the libraries' versions, and the threads.

    Args:
        device: Of the engines that were measured.
        threads: As in ``accel.load``; None: all cores that this process may use.
    """
    cpu = probe_cpu()
    found = {
        "device": device,
        "cpu": cpu.model,
        "isa": " ".join(cpu.isa),
        "cores": str(cpu.cores),
        "threads": str(threads or available_cores()),
        "accelrt": __version__,
    }
    if device == "cuda":
        names, driver = gpu_models()
        found |= {"gpus": ", ".join(dict.fromkeys(names)), "driver": driver}
        if len(set(names)) > 1:  # which one, then, decides
            found["visible"] = os.environ.get("CUDA_VISIBLE_DEVICES", "")
    versions = {name: version_of(name) for name in DISTRIBUTIONS[device]}
    return found | {name: version for name, version in versions.items() if version is not None}


def folders(store: str | None = None) -> tuple[Path, ...]:
    """Where figures are looked for, the best place first: in the engine store, and in the user's cache.

    A store that is no directory of this machine, or whose engines are signed, holds nothing that is not an engine.
    """
    own = cache_folder() / "measurements"
    place = store or os.environ.get("ACCEL_STORE") or ""
    place = place.removeprefix("file://")
    if not place or "://" in place or os.environ.get("ACCEL_STORE_KEY"):
        return (own,)
    return (Path(place).expanduser().absolute() / "measurements", own)


def remember(
    bundle: Bundle,
    device: Device,
    threads: int | None,
    rows: Iterable[Measured],
    *,
    cost: str,
    rounds: int,
    date: str,
    passed_over: Mapping[str, str] | None = None,
    store: str | None = None,
) -> Path:
    """Keeps what was measured; what was known of the bundle on this machine before is replaced.

    Args:
        bundle: The bundle.
        device: Of the engines.
        threads: As in ``accel.load``.
        rows: One per engine and variant.
        cost, rounds, date, passed_over: See ``Measurements``.
        store: As in ``accel.load``.

    Returns:
        The file.

    Raises:
        StorageError: It cannot be written, neither in the store nor in the user's cache.
    """
    machine = machine_identity(device, threads)
    base = _bundle_digest(bundle)
    kept = Measurements(SCHEMA, base, machine, date, rounds, cost, tuple(rows), dict(passed_over or {}))
    data = json.dumps(to_dict(kept), indent=1, allow_nan=False).encode()
    failure: OSError | None = None
    for folder in folders(store):
        path = folder / _name(base, machine)
        try:
            replace_file(path, data)
        except OSError as error:
            failure = failure or error
            continue
        return path
    assert failure is not None
    place = "Set ACCEL_CACHE to a path"
    raise as_storage_error(failure, folders(store)[0], place) or StorageError(
        f"What was measured cannot be written: {failure}", where=str(folders(store)[0]), remedy=place
    ) from failure


def recall(bundle: Bundle, device: Device, threads: int | None, store: str | None = None) -> Measurements | None:
    """What is known of a bundle on this machine, as it is now; None: nothing, or a file that cannot be read.

    Rows of graphs that the bundle no longer has are left out; without rows there is nothing known.
    """
    base = _bundle_digest(bundle)
    places = [folder for folder in folders(store) if any(folder.glob(f"{base}-*.json"))]
    if not places:  # the common case costs one look into the folder
        return None
    machine = machine_identity(device, threads)
    for folder in places:
        found = _read(folder / _name(base, machine), base, machine)
        if found is not None:
            return found
    return None


def recall_other_threads(bundle: Bundle, device: Device, store: str | None = None) -> tuple[Measurements, ...]:
    """What is known of a bundle on this machine with any number of threads, the smallest first."""
    base, own = _bundle_digest(bundle), _without_threads(machine_identity(device, None))
    known = [_load(path) for folder in folders(store) for path in sorted(folder.glob(f"{base}-*.json"))]
    here = [found for found in known if found is not None and found.bundle == base]
    same = [found for found in here if _without_threads(found.machine) == own and found.machine["threads"].isdigit()]
    return tuple(sorted(same, key=lambda found: int(found.machine["threads"])))


def _without_threads(machine: Mapping[str, str]) -> dict[str, str]:
    return {**machine, "threads": ""} if "threads" in machine else {}


def current(found: Measurements, bundle: Bundle, targets: Mapping[str, str]) -> Measurements | None:
    """Without the rows of graphs that the bundle no longer has; None: no row is left.

    Args:
        found: From ``recall``.
        bundle: The bundle as it is now.
        targets: Engine -> the target of its graphs; rows of other engines go too.
    """
    rows = tuple(
        row
        for row in found.rows
        if row.engine in targets and row.graph == graph_digest(bundle, row.variant, targets[row.engine])
    )
    return replace(found, rows=rows) if rows else None


def _read(path: Path, base: str, machine: dict[str, str]) -> Measurements | None:
    found = _load(path)
    return found if found is not None and (found.bundle, found.machine) == (base, machine) else None


def _load(path: Path) -> Measurements | None:
    try:
        if path.stat().st_size > MAX_BYTES:
            return None
        data = json.loads(path.read_bytes())
        if not isinstance(data, dict) or data.get("schema") != SCHEMA:
            return None
        found = from_dict(Measurements, data, str(path))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, RecursionError, AccelError) as error:
        _log.debug("what was measured before is ignored: %s", error)
        return None
    return found if all(row.cost > 0 for row in found.rows) else None


def _bundle_digest(bundle: Bundle) -> str:
    """Names a bundle by the graph that all others are made from: variants that are added do not change it."""
    variants = bundle.manifest.variants
    base = "fp32" if "fp32" in variants else next(iter(variants), None)
    if base is None:
        return _digest([])
    graphs = variants[base].graphs
    target = "canonical" if "canonical" in graphs else next(iter(graphs), "")
    return graph_digest(bundle, base, target) or _digest([])


def _name(base: str, machine: dict[str, str]) -> str:
    return f"{base}-{_digest(machine)}.json"


def _digest(value: object) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:32]


__all__ = [
    "DISTRIBUTIONS",
    "Device",
    "Measured",
    "Measurements",
    "current",
    "folders",
    "graph_digest",
    "machine_identity",
    "recall",
    "recall_other_threads",
    "remember",
]
