"""What ``accel build``, ``accel cache`` and ``accel quantize`` do, given their options. Returns the exit code."""

from __future__ import annotations

import json
import re
import time
from argparse import Namespace
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import accel
from accel.errors import InputError, RecipeError
from accel.schema import to_dict

if TYPE_CHECKING:
    from accel.engine_build import EngineReport
    from accel.store import Entry

_SIZE = re.compile(r"([0-9]+(?:\.[0-9]*)?|\.[0-9]+) ?(?:([kmgt])(i?))?b?")


def build(options: Namespace) -> int:
    """Builds a bundle's engines, or finds them in the store."""
    started = time.perf_counter()
    names = ("precision", "capacity", "max_batch", "optimization_level", "refittable", "store")
    choices = {name: getattr(options, name) for name in names}
    workspace = None if options.workspace is None else parse_size(options.workspace)
    reports = accel.build(
        options.bundle, options.target, options.sm or "auto",
        profiles=_read_profiles(options.profiles), workspace=workspace,
        hardware_compatibility=options.hardware_compatibility, **choices,
    )  # fmt: skip
    if options.json:
        print(
            json.dumps({"seconds": time.perf_counter() - started, "engines": [to_dict(report) for report in reports]})
        )
        return 0
    for report in reports:
        print("\n".join(describe(report, options.proof)))
    return 0


def describe(report: EngineReport, proof: bool = False) -> list[str]:
    """A built engine in a few lines."""
    facts = report.facts
    how = f"built in {facts['seconds']:.1f} s" if report.built else "from the store"
    head = f"{'+'.join(report.sm)} {report.variant}: {report.size / 1e6:.1f} MB, {how}  [{report.digest[:16]}]"
    layers = facts.get("layers", {})
    caches = f", {layers['kv_cache_update']} cache updates" if "kv_cache_update" in layers else ""
    lines = [head, f"  {facts['fused_attention']} fused attention layers{caches}, {sum(layers.values())} layers in all"]
    if report.capacity is not None:
        size = facts["cache_bytes"] / 1e6
        lines.append(f"  {report.max_batch} rows of {report.capacity} positions: {size:.0f} MB of cache on the GPU")
    if "buffer_bytes" in facts:
        size = facts["buffer_bytes"] / 1e6
        lines.append(f"  memory on the GPU: {size:.0f} MB of caches, inputs and outputs, beside the engine itself")
    if report.built and facts.get("peak_rss_bytes"):
        ratio = facts["peak_rss_bytes"] / max(1, facts["weight_bytes"])
        lines.append(f"  memory while building: {facts['peak_rss_bytes'] / 1e6:.0f} MB, {ratio:.1f} x the weights")
    lines.append(f"  proved: {facts['proof']['rows']} checks of the network against the graph hold")
    return lines + ([f"    {line}" for line in facts["proof"]["table"].splitlines()] if proof else [])


def quantize(options: Namespace) -> int:
    """Adds precisions to a bundle."""
    from accel.bundle import Bundle

    bundle = Bundle.open(options.bundle)
    before = {name: entry.size for name, entry in bundle.manifest.files.items()}
    for variant in options.variant:
        bundle = accel.add_variant(bundle, variant, check=not options.no_parity)
    manifest = bundle.manifest
    added = {name: entry.size for name, entry in manifest.files.items() if name not in before}
    parity = {name: result for name, result in manifest.parity.items() if name.partition("/")[0] in options.variant}
    if options.json:
        print(json.dumps({"variants": list(manifest.variants), "added": added, "parity": to_dict(parity)}))
        return 0
    print(f"{bundle.path}: {', '.join(manifest.variants)}; {sum(added.values()) / 1e6:.1f} MB added")
    for name, result in parity.items():
        print(f"{name}: error {result.max_rel_error:.1e} against {result.reference} (limit {result.limit:.0e})")
    return 0


def cache_ls(options: Namespace) -> int:
    """Lists the engines of a store."""
    return _print_entries(_store(options).entries(), options)


def cache_verify(options: Namespace) -> int:
    """Reads every engine and checks it; 1 when one is not to be trusted."""
    entries = _store(options).verify()
    _print_entries(entries, options)
    return 1 if any(entry.problem for entry in entries) else 0


def cache_prune(options: Namespace) -> int:
    """Removes the least recently used engines that nobody uses."""
    removed = _store(options).prune(parse_size(options.max_bytes))
    size = sum(record.bytes for record in removed)
    if options.json:
        print(json.dumps({"removed": [record.digest for record in removed], "bytes": size}))
    else:
        print(f"{len(removed)} engines removed, {size / 1e6:.1f} MB")
    return 0


def cache_rm(options: Namespace) -> int:
    """Removes engines by their digests, or beginnings of them."""
    store = _store(options)
    known = [entry.digest for entry in store.entries()]
    chosen = dict.fromkeys(_find(asked, known, store.url) for asked in options.digest)  # all, before one is removed
    removed = [digest for digest in chosen if store.remove(digest)]
    print(json.dumps({"removed": removed}) if options.json else f"{len(removed)} engines removed")
    return 0


def _find(asked: str, known: list[str], where: str) -> str:
    found = [digest for digest in known if asked and digest.startswith(asked)]
    if len(found) != 1:
        what = f"{len(found)} engines begin with {asked!r}" if found else f"The store has no engine {asked!r}"
        raise InputError(what, where=where, remedy="accel cache ls lists them")
    return found[0]


def _store(options: Namespace) -> Any:
    from accel.engines.tensorrt.lookup import open_store

    return open_store(options.store)


def _print_entries(entries: list[Entry], options: Namespace) -> int:
    if options.json:
        print(json.dumps({"engines": [_as_dict(entry) for entry in entries]}))
        return 0
    for entry in entries:
        used = time.strftime("%Y-%m-%d %H:%M", time.localtime(entry.last_used))
        print(f"{entry.digest[:16]}  {entry.bytes / 1e6:9.1f} MB  {used}  {entry.problem or _what(entry)}")
    total = sum(entry.bytes for entry in entries)
    print(f"{len(entries)} engines, {total / 1e6:.1f} MB")
    return 0


def _as_dict(entry: Entry) -> dict[str, Any]:
    key = None if entry.manifest is None else to_dict(entry.manifest.key)
    return {"digest": entry.digest, "bytes": entry.bytes, "last_used": entry.last_used, "problem": entry.problem,
            "key": key}  # fmt: skip


def _what(entry: Entry) -> str:
    assert entry.manifest is not None
    key = entry.manifest.key
    capacity = "" if key.capacity is None else f", capacity {key.capacity}"
    return f"{key.target} {key.library_version} {'+'.join(key.sm)} {key.variant}{capacity}"


def parse_size(text: str | None) -> int | None:
    """Bytes from ``500M``, ``2.5GB``, ``2GiB`` or a plain number; None stays None.

    Raises:
        InputError: Something else.
    """
    if text is None:
        return None
    found = _SIZE.fullmatch(text.strip().lower())
    if found is None:
        raise InputError(f"{text!r} is no size", where="size", remedy="Write bytes, or 500M, 2.5G, 2GiB")
    number, unit, binary = found.groups()
    return int(float(number) * (1024 if binary else 1000) ** " kmgt".index(unit or " "))


def _read_profiles(path: Path | None) -> Mapping[str, Any] | None:
    """A YAML file of profiles."""
    if path is None:
        return None
    import yaml

    try:
        data = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise RecipeError(f"Cannot read the profiles: {error.strerror}", where=str(path)) from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise RecipeError(f"The profiles are not YAML: {error}", where=str(path)) from error
    if not isinstance(data, dict):
        remedy = "Write 'name: {batch: {min, opt, max}, sequence: {min, opt, max}}'"
        raise RecipeError("The profiles are no mapping", where=str(path), remedy=remedy)
    return data
