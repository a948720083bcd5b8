"""Gathers an ``Inspection`` from a bundle."""

from __future__ import annotations

import math
from collections.abc import Iterator

from accel.bundle import ITEM_BYTES, Bundle
from accel.engines.kv_cache import ROUNDED_BYTES, bytes_per_token, cache_kind, rounded_cache
from accel.errors import BundleError, DependencyError, InputError
from accel.inspection.graph_file import AttentionNode, GraphFile, StoredTensor, read_graph
from accel.inspection.report import (
    AttentionLayer,
    CacheReport,
    CacheRow,
    FileReport,
    GraphReport,
    Inspection,
    LostGraph,
    WeightReport,
)
from accel.inspection.weights import count_weights
from accel.inspection.wording import printable
from accel.manifest import MANIFEST_NAME, GraphEntry
from accel.schema import to_dict
from accel.scheme import parse_scheme
from accel.spec import AttentionSpec

CAPACITIES = (1024, 4096)  # positions; the model's own maximum is added
MAX_NUMBER = 1 << 63  # of a manifest's numbers: no ONNX size or count reaches it
_OWN = {"num_heads": "heads", "kv_num_heads": "kv_heads", "scale": "scale", "window": "window", "softcap": "softcap"}
# Attributes of a kernel's node, and the field of AttentionSpec that each must agree with. MultiHeadAttention
# has neither window nor softcap: the window is a bias.
_AGREEING: dict[str, dict[str, str]] = {
    "accel::Attention": _OWN,
    "accel::CachedAttention": _OWN,
    "com.microsoft::GroupQueryAttention": {
        **{name: field for name, field in _OWN.items() if name != "window"},
        "local_window_size": "window",
    },
    "com.microsoft::MultiHeadAttention": {"num_heads": "heads", "scale": "scale"},
    "accel.cpu::Attention": {"num_heads": "heads", "scale": "scale"},
    "Attention": {"q_num_heads": "heads", "kv_num_heads": "kv_heads", "scale": "scale"},
    "MatMul": {"scale": "scale"},  # attention that is written out
}
_TOLERANCE = 4e-3  # a scale may be rounded to bfloat16


def inspect(bundle: Bundle) -> Inspection:
    """Looks into a bundle. Weight files are not read; graph files are, where onnx is installed.

    Raises:
        BundleError: A graph file is junk, or leads out of the bundle; the manifest's numbers are absurd.
    """
    _check_numbers(to_dict(bundle.full_manifest), MANIFEST_NAME)
    return _Collector(bundle).collect()


class _Collector:
    """One inspection; gathers warnings on the way."""

    def __init__(self, bundle: Bundle) -> None:
        self.bundle, self.manifest = bundle, bundle.manifest
        self.left_out: list[str] = []
        self.warnings: list[str] = []

    def collect(self) -> Inspection:
        manifest, full = self.manifest, self.bundle.full_manifest
        files = self._read_graphs()
        graphs = [
            self._graph(variant, target, entry, files.get((variant, target)))
            for variant, content in manifest.variants.items()
            for target, entry in content.graphs.items()
        ]
        weights = [self._weights(variant, files) for variant in manifest.variants]
        if not manifest.parity:
            self.warnings.append("No parity result: the numbers were not checked when this bundle was exported")
        for key, result in manifest.parity.items():
            if result.max_rel_error > result.limit:
                self.warnings.append(f"{key}: the error {result.max_rel_error:.1e} exceeds {result.limit:.0e}")
        return Inspection(
            path=str(self.bundle.path),
            source=manifest.source,
            accel_version=manifest.accel_version,
            schema_version=manifest.schema_version,
            arch=manifest.arch,
            variants={name: _matrices(name, variant.dtype) for name, variant in full.variants.items()},
            graphs=tuple(graphs),
            weights=tuple(weights),
            cache=self._cache(),
            files=tuple(FileReport(name, entry.size, entry.sha256) for name, entry in sorted(full.files.items())),
            parity=manifest.parity,
            tied=manifest.tied,
            versions=manifest.versions,
            notes=manifest.notes,
            left_out=tuple(self.left_out),
            warnings=tuple(self.warnings),
            lost=tuple(
                LostGraph(*key, files, self.bundle.lost_reason(*key) or "") for key, files in self.bundle.lost.items()
            ),
        )

    def _read_graphs(self) -> dict[tuple[str, str], GraphFile]:
        found = {}
        for variant, content in self.manifest.variants.items():
            for target, entry in content.graphs.items():
                try:
                    found[variant, target] = read_graph(self.bundle.file(entry.file))
                except DependencyError as error:
                    lost = "Left out: operators, attention kernels, and weights that are no parameters of the model"
                    self.left_out.append(f"{error.what}. {lost}. {error.remedy}")
                    return {}
        return found

    def _graph(self, variant: str, target: str, entry: GraphEntry, file: GraphFile | None) -> GraphReport:
        names = entry.attention_nodes
        if len(names) != len(self.manifest.arch.layers):
            count = len(self.manifest.arch.layers)
            self.warnings.append(f"{variant}/{target}: {len(names)} attention nodes for {count} layers")
        layers = []
        for index, (name, spec) in enumerate(zip(names, self.manifest.arch.layers)):
            node = None if file is None else file.attention.get(name)
            if file is not None and node is None:
                self.warnings.append(f"{variant}/{target}: the graph has no attention node {name!r} (layer {index})")
            layers.append(self._layer(f"{variant}/{target}", index, name, spec, node))
        return GraphReport(
            variant=variant,
            target=target,
            file=entry.file,
            size=self.manifest.files[entry.file].size,
            opset=entry.opset,
            inputs=entry.inputs,
            outputs=entry.outputs,
            passes=entry.passes,
            attention=tuple(layers),
            nodes=None if file is None else file.nodes,
        )

    def _layer(
        self, where: str, index: int, name: str, spec: AttentionSpec, node: AttentionNode | None
    ) -> AttentionLayer:
        if node is not None:
            found = dict.fromkeys(line for op, numbers in node.kernels for line in _differences(op, numbers, spec))
            self.warnings += [f"{where}: layer {index}: {difference}" for difference in found]
        return AttentionLayer(
            index, name, spec.heads, spec.kv_heads, spec.head_dim, spec.scale, spec.window, spec.softcap, spec.causal,
            *((node.op, node.branch, node.rotary, node.packed_qkv) if node is not None else ()),
        )  # fmt: skip

    def _weights(self, variant: str, files: dict[tuple[str, str], GraphFile]) -> WeightReport:
        stored: dict[tuple[str, int, int], StoredTensor] = {}
        for (owner, target), file in files.items():
            for tensor in file.stored if owner == variant else ():
                self._check_reference(variant, target, tensor)
                stored.setdefault((tensor.file, tensor.offset, tensor.size), tensor)
        return count_weights(self.manifest, variant, stored.values())

    def _check_reference(self, variant: str, target: str, tensor: StoredTensor) -> None:
        """A graph may only point into the variant's own weight files, or those listed for it, inside their size."""
        owner, where = self.manifest.variants[variant], f"{variant}/{target}"
        if tensor.file not in (*owner.weights, *(owner.graphs[target].weights or ())):
            self.warnings.append(f"{where}: {tensor.name!r} lies in {tensor.file!r}, no weight file of this variant")
        elif tensor.offset < 0 or tensor.offset + tensor.size > self.manifest.files[tensor.file].size:
            self.warnings.append(f"{where}: {tensor.name!r} lies outside {tensor.file!r}")

    def _cache(self) -> CacheReport | None:
        arch = self.manifest.arch
        if arch.kind != "decoder":
            return None
        graphs = [entry for variant in self.manifest.variants.values() for entry in variant.graphs.values()]
        pasts = [spec for entry in graphs for spec in entry.inputs if spec.name.startswith("past.")]
        dtype = pasts[0].dtype if pasts else "float32"
        token = bytes_per_token(arch, ITEM_BYTES.get(dtype, 4))
        capacities = [*(size for size in CAPACITIES if size < arch.max_positions), arch.max_positions]
        return CacheReport(
            dtype=dtype,
            shapes=tuple(("rows", layer.kv_heads, "capacity", layer.head_dim) for layer in arch.layers),
            bytes_per_token=token,
            rows=tuple(CacheRow(capacity, capacity * token) for capacity in capacities),
            rounded=tuple(
                (name, kind, bytes_per_token(arch, ROUNDED_BYTES[kind]))
                for name in self.manifest.variants
                if (kind := rounded_cache(self.bundle, name)) is not None
            ),
            kinds=self._cache_kinds(),
        )

    def _cache_kinds(self) -> tuple[tuple[str, int, tuple[str, ...]], ...]:
        """See ``CacheReport.kinds``; a variant's integers are beside one type on a CPU and beside another on a GPU."""
        arch, found = self.manifest.arch, dict[str, list[str]]()
        for name, variant in self.manifest.variants.items():
            targets: dict[str, list[str]] = {}
            for target, entry in variant.graphs.items():
                targets.setdefault(cache_kind(arch, entry) or "", []).append(target)
            for kind, having in targets.items():
                told = name if len(targets) == 1 else f"{name} for {' and '.join(having)}"
                found.setdefault(kind, []).append(told)
        sizes = ITEM_BYTES | ROUNDED_BYTES
        kinds = ((kind, bytes_per_token(arch, sizes[kind]), names) for kind, names in found.items() if kind in sizes)
        return tuple((kind, token, tuple(names)) for kind, token, names in kinds)


def _matrices(variant: str, dtype: str) -> str:
    """The type of a variant's matrices; of one that a later accel named, the manifest's."""
    try:
        bits = parse_scheme(variant).weight_bits
    except InputError:
        return dtype
    return dtype if bits is None else f"int{bits}"


def _differences(op: str, attributes: dict[str, int | float], spec: AttentionSpec) -> Iterator[str]:
    """Where a kernel's node says something else than the manifest."""
    for attribute, field in _AGREEING.get(op, {}).items():
        found, expected = attributes.get(attribute), getattr(spec, field)
        if op == "Attention" and found is None and field != "scale":
            continue  # its inputs have an axis of heads
        if found in (0, -1):  # how a kernel says that it has no window, softcap or scale of its own
            found = None
        if found is None and field == "scale":  # 1 / sqrt(head size)
            found = spec.head_dim**-0.5 if spec.head_dim > 0 else None
        same = found == expected
        if found is not None and expected is not None:
            same = math.isclose(found, expected, rel_tol=_TOLERANCE)
        if not same:
            yield f"the node has {attribute} {found}, the manifest says {field} {expected}"


def _check_numbers(data: object, where: str) -> None:
    """Refuses integers that no real bundle has and arithmetic on floats cannot take.

    Raises:
        BundleError: There is one.
    """
    if isinstance(data, int) and abs(data) >= MAX_NUMBER:
        raise BundleError("A number of the manifest is out of range", where=where, remedy="Export the model again")
    if isinstance(data, dict):
        for key, value in data.items():
            _check_numbers(value, f"{where}: {printable(key)}")
    elif isinstance(data, list):
        for value in data:
            _check_numbers(value, where)


__all__ = ["inspect"]
