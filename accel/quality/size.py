"""How many bytes of weights an engine reads of a variant."""

from __future__ import annotations

import math
from collections.abc import Iterable

from accel.bundle import ITEM_BYTES, Bundle
from accel.errors import DependencyError
from accel.inspection.graph_file import read_graph
from accel.manifest import ParameterEntry, StoredSize

_TARGETS = {"rtx": "tensorrt"}  # engines that run a graph of another's name
_PARAMETERS_ALONE = "torch"  # the engine that runs no graph
Range = tuple[str, int, int]  # file, start, stop


def stored_size(bundle: Bundle, variant: str, engine: str) -> StoredSize:
    """Bytes and numbers of a variant's weights, as one engine reads them.

    Counted are what the graph's initializers refer to (ranges that overlap once), the constants inside the graph's
    own file, and the embedding table whose rows are looked up outside the graph. Where onnx is not installed: the
    sizes of the weight files, which may hold tensors of other graphs too.

    Args:
        bundle: The bundle.
        variant: Its variant.
        engine: The engine's name.

    Raises:
        BundleError: No such variant, or the graph is junk.
    """
    arch, content = bundle.manifest.arch, bundle.variant(variant)
    scales = 0 if content.quantization is None else content.quantization.scales
    numbers = arch.parameters + scales
    if engine == _PARAMETERS_ALONE:
        ranges = [_range(entry) for entry in bundle.manifest.parameters.values()]
        return StoredSize(covered_bytes(ranges), numbers)
    target = target_of(bundle, variant, engine)
    try:
        graph = read_graph(bundle.file(bundle.graph(variant, target).file))
    except DependencyError:
        files = bundle.weights(variant, target)
        return StoredSize(sum(bundle.manifest.files[name].size for name in files), numbers, exact=False)
    ranges = [(tensor.file, tensor.offset, tensor.offset + tensor.size) for tensor in graph.stored]
    table = bundle.manifest.parameters.get(graph.embedding or "")
    if table is not None:
        ranges.append(_range(table))
    return StoredSize(covered_bytes(ranges) + graph.nodes.inline_bytes, numbers)


def target_of(bundle: Bundle, variant: str, engine: str) -> str:
    """The target whose graph an engine runs; of an engine that is none: ``ort-cpu``, else the first there is."""
    graphs = bundle.variant(variant).graphs
    wanted = _TARGETS.get(engine, engine)
    return next((name for name in (wanted, "ort-cpu", *graphs) if name in graphs), wanted)


def covered_bytes(ranges: Iterable[Range]) -> int:
    """Bytes that lie in at least one of the ranges."""
    total, file, end = 0, "", 0
    for name, start, stop in sorted(ranges):
        if name != file:
            file, end = name, 0
        total += max(0, stop - max(start, end))
        end = max(end, stop)
    return total


def _range(entry: ParameterEntry) -> Range:
    return entry.file, entry.offset, entry.offset + math.prod(entry.shape) * ITEM_BYTES[entry.dtype]


__all__ = ["covered_bytes", "stored_size", "target_of"]
