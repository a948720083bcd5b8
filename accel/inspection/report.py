"""What an inspection found, as frozen dataclasses; they hold numbers and names, no formatting."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Literal

from accel.manifest import ParityResult, PassReport
from accel.schema import to_dict
from accel.spec import ArchSpec, TensorSpec

Rotary = Literal["inside", "outside", "none"]
PARTS = ("embedding", "attention", "mlp", "norm", "head", "other")


@dataclass(frozen=True)
class AttentionLayer:
    """One layer's attention: what the manifest says of the layer, and what its node in the graph shows.

    The last four are None where the graph was not read or lacks the node.

    Attributes:
        layer: Index of the layer.
        name: The node's name.
        heads, kv_heads, head_dim, scale, window, softcap, causal: See ``accel.spec.AttentionSpec``.
        op: ``domain::type`` of the kernel's node.
        branch: ``domain::type`` of the node around it that chooses between kernels, such as ``If``.
        rotary: Whether rotary embedding happens in the kernel, in nodes before it, or not at all.
        packed_qkv: Whether query, key and value enter as one tensor.
    """

    layer: int
    name: str
    heads: int
    kv_heads: int
    head_dim: int
    scale: float
    window: int | None
    softcap: float | None
    causal: bool
    op: str | None = None
    branch: str | None = None
    rotary: Rotary | None = None
    packed_qkv: bool | None = None


@dataclass(frozen=True)
class GraphNodes:
    """What only the graph file says.

    Attributes:
        top: Nodes of the main graph.
        inner: Nodes of its subgraphs (branches).
        functions: Function bodies that the file carries for private operators.
        operators: ``domain::type`` -> count, subgraphs included, most frequent first.
        inline_bytes: Constants that lie in the graph file itself.
    """

    top: int
    inner: int
    functions: int
    operators: dict[str, int]
    inline_bytes: int


@dataclass(frozen=True)
class GraphReport:
    """One graph of a variant. ``nodes`` is None where graph files cannot be read."""

    variant: str
    target: str
    file: str
    size: int  # bytes
    opset: int
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    passes: tuple[PassReport, ...]
    attention: tuple[AttentionLayer, ...]
    nodes: GraphNodes | None


@dataclass(frozen=True)
class WeightShare:
    """Some tensors together: how many, their elements and their bytes in the weight files."""

    tensors: int
    elements: int
    bytes: int


@dataclass(frozen=True)
class WeightGroup:
    """Tensors whose names differ in the layer's number only, which ``*`` stands for."""

    part: str  # one of PARTS
    name: str
    dtype: str
    share: WeightShare


@dataclass(frozen=True)
class WeightReport:
    """The weight files of one variant: every byte that a parameter or graph refers to, counted once.

    ``formats`` is keyed by dtype, ``parts`` by the entries of ``PARTS`` that occur.
    ``file_bytes - referenced_bytes`` is padding between tensors.
    """

    variant: str
    files: tuple[str, ...]
    file_bytes: int
    referenced_bytes: int
    formats: dict[str, WeightShare]
    parts: dict[str, WeightShare]
    groups: tuple[WeightGroup, ...]


@dataclass(frozen=True)
class CacheRow:
    """Bytes of one row (one sequence) at a capacity in positions."""

    capacity: int
    bytes: int


@dataclass(frozen=True)
class CacheReport:
    """A decoder's KV cache. Keys and values each have ``shapes[layer]``.

    ``rounded`` are the variants whose caches are: (variant, ``int8``, ``int4`` or ``fp8``, bytes per token). ``kinds``
    are all that some graph has: (``float16``, ``int8``, ..., bytes per token, its variants, with their targets where
    not all of a variant's graphs have it).
    """

    dtype: str
    shapes: tuple[tuple[int | str, ...], ...]  # per layer: [rows, kv heads, capacity, head size]
    bytes_per_token: int
    rows: tuple[CacheRow, ...]
    rounded: tuple[tuple[str, str, int], ...] = ()
    kinds: tuple[tuple[str, int, tuple[str, ...]], ...] = ()


@dataclass(frozen=True)
class FileReport:
    """One file that the manifest lists; ``size`` in bytes."""

    name: str
    size: int
    sha256: str


@dataclass(frozen=True)
class LostGraph:
    """A graph that cannot run: the files that it lacks, and the commands that make it again or drop it."""

    variant: str
    target: str
    files: tuple[str, ...]
    reason: str


@dataclass(frozen=True)
class Inspection:
    """Everything that ``accel inspect`` shows.

    ``notes`` says what the export left behind or did without, ``left_out`` what could not be read here and how to
    get it, ``warnings`` where the bundle's own statements disagree. Graphs that files are missing of are ``lost``, and
    in none of the other tables; their variants are in ``variants``.
    """

    path: str
    source: str
    accel_version: str
    schema_version: int
    arch: ArchSpec
    variants: dict[str, str]  # name -> type of its matrices, int8 or int4 where they are rounded
    graphs: tuple[GraphReport, ...]
    weights: tuple[WeightReport, ...]
    cache: CacheReport | None
    files: tuple[FileReport, ...]
    parity: dict[str, ParityResult]
    tied: dict[str, str]
    versions: dict[str, str]
    notes: tuple[str, ...]
    left_out: tuple[str, ...]
    warnings: tuple[str, ...]
    lost: tuple[LostGraph, ...] = ()

    @property
    def missing(self) -> set[str]:
        """The files that are listed and not there."""
        return {file for graph in self.lost for file in graph.files}

    def to_json(self) -> str:
        """One JSON object with everything."""
        return json.dumps(to_dict(self), indent=1, allow_nan=False)


__all__ = [
    "PARTS",
    "AttentionLayer",
    "CacheReport",
    "CacheRow",
    "FileReport",
    "GraphNodes",
    "GraphReport",
    "Inspection",
    "LostGraph",
    "Rotary",
    "WeightGroup",
    "WeightReport",
    "WeightShare",
]
