"""What ``accel build`` and ``accel cache`` do, given their options. Returns the exit code."""

from __future__ import annotations

import json
import time
from argparse import Namespace
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import accel
from accel.errors import InputError
from accel.progress import phases_on_stderr
from accel.recipe import read_yaml
from accel.schema import to_dict
from accel.sizes import parse_size

if TYPE_CHECKING:
    from accel.engine_build import EngineReport
    from accel.store import EngineStore, Entry


@phases_on_stderr()
def build(options: Namespace) -> int:
    """Builds a bundle's engines, or finds them in the store."""
    started = time.perf_counter()
    names = ("precision", "capacity", "max_batch", "optimization_level", "workspace", "refittable", "store")
    choices = {name: getattr(options, name) for name in names}
    reports = accel.build(
        options.bundle, options.target, options.sm or "auto",
        profiles=_read_profiles(options.profiles), hardware_compatibility=options.hardware_compatibility, **choices,
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
    if report.built:
        lines.append(f"  layers: {', '.join(f'{count} {kind}' for kind, count in layers.items())}")
    if report.built and not facts.get("peak_rss_bytes"):
        lines.append("  memory while building: not known (this process did other work before)")
    elif report.built:
        ratio = facts["peak_rss_bytes"] / max(1, facts["weight_bytes"])
        lines.append(f"  memory while building: {facts['peak_rss_bytes'] / 1e6:.0f} MB, {ratio:.1f} x the weights")
    times = [f"{profile} {value:.2f} ms" for profile, value in (report.latency_ms or {}).items()]
    lines.append(f"  latency: {', '.join(times) or f'not measured ({report.not_measured})'}")
    lines.append(f"  proved: {facts['proof']['rows']} checks of the network against the graph hold")
    return lines + ([f"    {line}" for line in facts["proof"]["table"].splitlines()] if proof else [])


def cache_ls(options: Namespace) -> int:
    """Lists the engines of a store."""
    store = _store(options)
    entries = store.entries()
    if options.json:
        print(json.dumps(_listing(store, entries)))
        return 0
    for entry in entries:
        print(_line(entry))
    print(f"{_total(entries)}; store {store.url}")
    return 0


def cache_verify(options: Namespace) -> int:
    """Reads every engine and checks it; 1 when one is not to be trusted."""
    store = _store(options)
    entries = store.verify()
    bad = [entry for entry in entries if entry.problem]
    if options.json:
        print(json.dumps({**_listing(store, entries), "ok": not bad}))
        return 1 if bad else 0
    for entry in bad:
        print(_line(entry))
    print(f"{_total(entries)}, {f'{len(bad)} bad' if bad else 'all good'}; store {store.url}")
    return 1 if bad else 0


def cache_prune(options: Namespace) -> int:
    """Removes the least recently used engines that nobody uses."""
    removed = _store(options).prune(parse_size(options.max_bytes, "--max-bytes"))
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


def _store(options: Namespace) -> EngineStore:
    from accel.engines.tensorrt.lookup import open_store

    return open_store(options.store)


def _total(entries: list[Entry]) -> str:
    return f"{len(entries)} engines, {sum(entry.bytes for entry in entries) / 1e6:.1f} MB"


def _line(entry: Entry) -> str:
    used = time.strftime("%Y-%m-%d %H:%M", time.localtime(entry.last_used))
    return f"{entry.digest[:16]}  {entry.bytes / 1e6:9.1f} MB  {used}  {entry.problem or _what(entry)}"


def _what(entry: Entry) -> str:
    """What a sound engine is for, in a line."""
    assert entry.manifest is not None
    key, facts = entry.manifest.key, entry.manifest.facts
    name = facts.get("bundle") or facts.get("model")  # the source's last folder may be "model" of every one
    model = f"{name} " if name else ""
    rows = f"{facts['max_batch']} rows" if "max_batch" in facts else ""
    capacity = f"capacity {key.capacity}" if key.capacity is not None else ""
    profiles = (_profile_text(name, ranges) for name, ranges in _profiles(entry).items())
    head = f"{model}{key.target} {key.library_version} {'+'.join(key.sm)} {key.variant}"
    return ", ".join(filter(None, [head, rows, capacity, *profiles]))


def _profile_text(name: str, ranges: Mapping[str, tuple[int, int, int]]) -> str:
    sizes = [f"{least}-{most}" if least < most else str(most) for least, _, most in ranges.values()]
    return f"{name} {' x '.join(sizes)}".strip()


def _profiles(entry: Entry) -> dict[str, dict[str, tuple[int, int, int]]]:
    """Name -> batch and sequence -> (min, opt, max); nothing of a profile whose inputs have no ids."""
    assert entry.manifest is not None
    found = {}
    for name, inputs in entry.manifest.key.profiles.items():
        shapes = inputs.get("input_ids", ((), (), ()))
        found[name] = dict(zip(("batch", "sequence"), zip(*shapes, strict=True), strict=False))
    return found


def _listing(store: EngineStore, entries: list[Entry]) -> dict[str, Any]:
    engines = [_as_dict(entry) for entry in entries]
    return {"store": store.url, "bytes": sum(entry.bytes for entry in entries), "engines": engines}


def _as_dict(entry: Entry) -> dict[str, Any]:
    plain = {"digest": entry.digest, "bytes": entry.bytes, "last_used": entry.last_used, "problem": entry.problem}
    if entry.manifest is None:
        return {**plain, **dict.fromkeys(("model", "bundle", "max_batch", "capacity", "profiles", "key"))}
    key, facts = entry.manifest.key, entry.manifest.facts
    return {
        **plain, "model": facts.get("model"), "bundle": facts.get("bundle"), "max_batch": facts.get("max_batch"),
        "capacity": key.capacity, "profiles": _profiles(entry), "key": to_dict(key),
    }  # fmt: skip


def _read_profiles(path: Path | None) -> Mapping[str, Any] | None:
    """A YAML file of profiles, see docs/build.md."""
    return None if path is None else read_yaml(path, "profiles file")
