"""The bundle's manifest as frozen dataclasses; ``accel.schema`` reads and writes them as JSON."""

from __future__ import annotations

from dataclasses import dataclass, field

from accel.spec import ArchSpec, TensorSpec

SCHEMA_VERSION = 1
MANIFEST_NAME = "manifest.json"


@dataclass(frozen=True)
class FileEntry:
    """Size in bytes and sha256 of one file, keyed in the manifest by its path inside the bundle."""

    size: int
    sha256: str


@dataclass(frozen=True)
class PassReport:
    """What one graph pass did: node totals around it and what it fused, by name."""

    name: str
    nodes_before: int
    nodes_after: int
    fused: dict[str, int] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class GraphEntry:
    """One graph file of a variant.

    ``lowering`` is the version of the target's lowering that wrote it; None where the target has none, or the bundle
    was written before versions were recorded. Such a TensorRT graph counts as outdated.
    """

    file: str
    opset: int
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    attention_nodes: tuple[str, ...]  # node names, one per layer, in layer order
    passes: tuple[PassReport, ...] = ()
    lowering: int | None = None


@dataclass(frozen=True)
class Variant:
    """One precision of the model: its weight files and one graph per target.

    ``graphs`` maps a target (``canonical``, ``ort-cpu``) to its graph. All graphs of a
    variant read the same weight files.
    """

    dtype: str
    weights: tuple[str, ...]
    graphs: dict[str, GraphEntry]


@dataclass(frozen=True)
class ParameterEntry:
    """Where one parameter of the PyTorch model lies, in PyTorch's own layout."""

    file: str
    offset: int
    shape: tuple[int, ...]
    dtype: str


@dataclass(frozen=True)
class ParityResult:
    """One comparison made at export, on random ids.

    Errors are relative to the largest reference magnitude: ``max|a - b| / max|b|``.

    ``longest`` is the longest row in tokens: a window that is longer was not seen to act.
    """

    reference: str  # e.g. "torch eager fp32"
    cases: int
    max_abs_error: float
    max_rel_error: float
    limit: float
    greedy_tokens_equal: int | None = None
    greedy_tokens_total: int | None = None
    longest: int | None = None


@dataclass(frozen=True)
class Manifest:
    """Everything a runtime needs to know before it opens a graph."""

    schema_version: int
    accel_version: str
    source: str
    arch: ArchSpec
    variants: dict[str, Variant]
    files: dict[str, FileEntry]
    versions: dict[str, str]
    parity: dict[str, ParityResult] = field(default_factory=dict)  # "variant/target" -> result
    parameters: dict[str, ParameterEntry] = field(default_factory=dict)  # for the PyTorch reference engine
    tied: dict[str, str] = field(default_factory=dict)  # parameter -> the parameter it shares storage with
    notes: tuple[str, ...] = ()  # what the export left behind, or did without


__all__ = [
    "MANIFEST_NAME",
    "SCHEMA_VERSION",
    "FileEntry",
    "GraphEntry",
    "Manifest",
    "ParameterEntry",
    "ParityResult",
    "PassReport",
    "TensorSpec",
    "Variant",
]
