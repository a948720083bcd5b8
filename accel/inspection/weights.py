"""Counts a variant's weights by format and by part of the model; every referenced byte counts once."""

from __future__ import annotations

import bisect
import itertools
import math
import re
from collections import defaultdict
from collections.abc import Iterable

from accel.bundle import ITEM_BYTES
from accel.inspection.graph_file import StoredTensor
from accel.inspection.report import PARTS, WeightGroup, WeightReport, WeightShare
from accel.manifest import Manifest

MAX_NAME = 256  # characters of a name that are looked at; the patterns are not made for more
# By name, the first match counts. The names are those of PyTorch modules, in the families that are exported.
_RULES: tuple[tuple[str, re.Pattern[str]], ...] = (
    ("norm", re.compile(r"(^|[._])(\w*norm|ln_?\w{1,2}|norm\d)\.(weight|bias)$", re.IGNORECASE)),
    ("head", re.compile(r"(^|\.)(lm_head|classifier|pre_classifier|qa_outputs|score|cls|pooler|vocab_\w+)\.")),
    ("head", re.compile(r"(^|\.)(generator_\w+|discriminator_\w+)\.|^(decoder|head)\.(?!layers?\.)")),
    ("attention", re.compile(r"attn|attention|(^|\.)qkv\.|(^|\.)[qkvo]_(proj|lin)\.", re.IGNORECASE)),
    ("mlp", re.compile(r"mlp|ffn|feed_forward|intermediate|(gate|up|gate_up|down)_proj|(^|\.)(fc|lin)\d\.")),
    ("mlp", re.compile(r"\.\d+\.output\.dense\.")),
    ("embedding", re.compile(r"embed|(^|\.)w[tp]e\.")),
)


def part_of(name: str) -> str:
    """The part of the model that a tensor belongs to, one of ``PARTS``, from its name alone."""
    tail = name[-MAX_NAME:]
    return next((part for part, pattern in _RULES if pattern.search(tail)), PARTS[-1])


def count_weights(manifest: Manifest, variant: str, stored: Iterable[StoredTensor]) -> WeightReport:
    """Sums up one variant.

    Args:
        manifest: Its parameters come first: what graphs refer to beyond them (tables, packed weights) is added.
        variant: Name of the variant.
        stored: What the variant's graphs refer to; empty where graphs cannot be read.
    """
    stored = list(stored)
    owner = manifest.variants[variant]
    listed = [file for graph in owner.graphs.values() for file in graph.weights or ()]  # of other variants too
    read = dict.fromkeys([*owner.weights, *listed, *(item.file for item in stored)])
    files = tuple(file for file in read if file in manifest.files)
    tensors: list[StoredTensor] = []
    for file in read:
        parameters = [
            StoredTensor(name, file, entry.offset, math.prod(entry.shape) * ITEM_BYTES[entry.dtype],
                         math.prod(entry.shape), entry.dtype)
            for name, entry in manifest.parameters.items()
            if entry.file == file
        ]  # fmt: skip
        tensors += _count_once(parameters, _Coverage([]))
        covered = _Coverage([(item.offset, item.offset + item.size) for item in parameters])
        tensors += _count_once([item for item in stored if item.file == file], covered)
    return WeightReport(
        variant=variant,
        files=files,
        file_bytes=sum(manifest.files[name].size for name in files),
        referenced_bytes=sum(item.size for item in tensors),
        formats=_shares(tensors, [item.dtype for item in tensors]),
        parts=_shares(tensors, [part_of(item.name) for item in tensors]),
        groups=_groups(tensors),
    )


def _count_once(tensors: list[StoredTensor], covered: _Coverage) -> list[StoredTensor]:
    """The tensors that refer to bytes not counted yet, each with the number of those bytes."""
    kept, end = [], 0
    for item in sorted(tensors, key=lambda item: (item.offset, -item.size)):
        start, stop = max(item.offset, end), item.offset + item.size
        size = covered.uncovered(start, stop)
        if size > 0:
            elements = item.elements if size == item.size else round(item.elements * size / item.size)
            kept.append(StoredTensor(item.name, item.file, item.offset, size, elements, item.dtype))
        end = max(end, stop)
    return kept


class _Coverage:
    """A union of byte ranges that tells how much of another range it leaves uncovered."""

    def __init__(self, ranges: list[tuple[int, int]]) -> None:
        merged: list[list[int]] = []
        for start, stop in sorted(ranges):
            if merged and start <= merged[-1][1]:
                merged[-1][1] = max(merged[-1][1], stop)
            else:
                merged.append([start, stop])
        self._starts = [start for start, _ in merged]
        self._stops = [stop for _, stop in merged]
        self._before = [0, *itertools.accumulate(stop - start for start, stop in merged)]

    def uncovered(self, start: int, stop: int) -> int:
        if stop <= start:
            return 0
        return stop - start - (self._below(stop) - self._below(start))

    def _below(self, position: int) -> int:
        index = bisect.bisect_right(self._starts, position)
        if index == 0:
            return 0
        return self._before[index - 1] + min(position, self._stops[index - 1]) - self._starts[index - 1]


def _sum(tensors: list[StoredTensor]) -> WeightShare:
    return WeightShare(len(tensors), sum(item.elements for item in tensors), sum(item.size for item in tensors))


def _shares(tensors: list[StoredTensor], keys: list[str]) -> dict[str, WeightShare]:
    found = defaultdict(list)
    for key, item in zip(keys, tensors):
        found[key].append(item)
    order = {part: index for index, part in enumerate(PARTS)}
    return {key: _sum(found[key]) for key in sorted(found, key=lambda key: (order.get(key, 0), key))}


def _groups(tensors: list[StoredTensor]) -> tuple[WeightGroup, ...]:
    found = defaultdict(list)
    for item in tensors:
        found[part_of(item.name), re.sub(r"(?<=\.)\d+(?=\.)", "*", item.name), item.dtype].append(item)
    groups = [WeightGroup(*key, share=_sum(items)) for key, items in found.items()]
    return tuple(sorted(groups, key=lambda group: (-group.share.bytes, group.name)))


__all__ = ["count_weights", "part_of"]
