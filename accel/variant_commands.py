"""What ``accel quantize`` does, given its options. Returns the exit code."""

from __future__ import annotations

import json
import sys
from argparse import Namespace
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import accel
from accel.errors import InputError
from accel.manifest import FileEntry, Manifest, Quality, Quantization
from accel.progress import phases_on_stderr
from accel.recorded_choices import difference, same_choice
from accel.schema import to_dict

if TYPE_CHECKING:
    from accel.bundle import Bundle

_PASSED = ("algorithm", "calibration", "head_bits", "max_bytes", "max_layer_error", "q_budget", "text")
_GATE = ("max_q_drop", "min_cosine")


def quantize(options: Namespace) -> int:
    """Adds variants to a bundle, or drops some."""
    return _add(options) if options.drop is None else _drop(options)


def _drop(options: Namespace) -> int:
    """Drops variants, or their graphs for the targets that are named; checks all names first."""
    from accel.bundle import Bundle
    from accel.variant_removal import check_drop

    given = [name for name in (*_PASSED, "keep", *_GATE) if getattr(options, name) is not None]
    given = [name for name in given if name != "algorithm" or options.algorithm != "auto"]
    given += [name for name in ("no_parity", "no_quality") if getattr(options, name)]
    if given:
        what = f"{_as_option(given[0])} is for variants that are added, and --drop adds none"
        raise InputError(what, where=_as_option(given[0]), remedy="Leave it out")
    bundle = Bundle.open(options.bundle)
    asked = [check_drop(bundle, name, target) for name in options.drop for target in options.target or (None,)]
    wanted = dict.fromkeys((name, target) for name, targets in asked for target in targets)
    before, dropped = bundle.manifest.files, list[str]()  # without those that were gone already
    try:
        for name, target in wanted:
            bundle = accel.drop_variant(bundle, name, target=target)
            dropped.append(f"{name}/{target}")
    except BaseException:
        if dropped:
            print(f"dropped before this failed: {', '.join(dropped)}", file=sys.stderr)
        raise
    _print_dropped(bundle, before, dropped, options.json)
    return 0


def _print_dropped(bundle: Bundle, before: Mapping[str, FileEntry], dropped: Sequence[str], as_json: bool) -> None:
    gone = {name: entry.size for name, entry in before.items() if not bundle.has(name)}
    stuck = [name for name in gone if (bundle.path / name).exists()]  # immutable, say
    removed = {name: size for name, size in gone.items() if name not in stuck}
    left = list(bundle.full_manifest.variants)
    if as_json:
        print(json.dumps({"variants": left, "dropped": dropped, "removed": removed, "not_removed": stuck}))
        return
    print(f"{bundle.path}: {', '.join(left)}; {sum(removed.values()) / 1e6:.1f} MB removed")
    print(f"dropped {', '.join(dropped)}")
    if stuck:
        print(f"not removed, though nothing lists them any more: {', '.join(stuck)}; delete them")


def _as_option(name: str) -> str:
    return "--" + name.replace("_", "-")


@phases_on_stderr()
def _add(options: Namespace) -> int:
    """Adds variants, for the targets asked for, or see ``default_targets``; checks all names first."""
    from accel.bundle import Bundle
    from accel.quality import Gate
    from accel.scheme import parse_scheme
    from accel.variant_targets import default_targets, find_target
    from accel.variants import check_addition, check_packages, is_current, read_choices

    before = bundle = Bundle.open(options.bundle)
    names = [parse_scheme(variant).name for variant in options.variant]
    targets = [find_target(name).name for name in options.target or ()]
    arch = bundle.manifest.arch
    usual = {name: targets or default_targets(arch, name, bundle.path) for name in options.variant}
    wanted = [(name, target) for name in options.variant for target in usual[name]]
    choices = {name: getattr(options, name) for name in _PASSED}
    choices |= {"measure": not options.no_quality, "keep": _read_keep(options.keep)}
    quantizing = read_choices(**choices, gate=Gate(options.max_q_drop, options.min_cosine))
    checked = [check_addition(bundle, name, target, quantizing) for name, target in wanted]
    for scheme, target in checked:
        if not is_current(bundle, scheme.name, target.name):
            check_packages(scheme, target, not options.no_parity)
    known: dict[str, list[str]] = {}  # -> options that changed nothing
    for scheme, target in checked:
        if is_current(bundle, scheme.name, target.name):
            known[f"{scheme.name}/{target.name}"] = _not_applied(options, bundle.variant(scheme.name).quantization)
        bundle = accel.add_variant(
            bundle, scheme.name, target=target.name, check=not options.no_parity,
            max_q_drop=options.max_q_drop, min_cosine=options.min_cosine, **choices,
        )  # fmt: skip
    if options.json:
        print(json.dumps(_as_json(before, bundle, names, known)))
    else:
        _print_added(before, bundle, names, known)
    return 0


def _added(before: Bundle, bundle: Bundle) -> dict[str, int]:
    """Files that are new -> bytes."""
    return {name: entry.size for name, entry in bundle.manifest.files.items() if not before.has(name)}


def _mended(before: Bundle, bundle: Bundle) -> dict[str, tuple[str, ...]]:
    """Graphs that were made again -> the files that they had lost."""
    return {"/".join(key): files for key, files in before.lost.items() if key not in bundle.lost}


def _made_otherwise(before: Bundle, bundle: Bundle) -> dict[str, str]:
    """Graphs that were made again with other integers than the manifest recorded -> how these came about."""
    found = {}
    for key in _mended(before, bundle):
        name = key.partition("/")[0]
        known, new = (one.full_manifest.variants[name].quantization for one in (before, bundle))
        if known is not None and new is not None and not same_choice(known, new):
            found[key] = difference(known, new)
    return found


def _as_json(before: Bundle, bundle: Bundle, names: Sequence[str], known: Mapping[str, list[str]]) -> dict[str, object]:
    return {
        "variants": list(bundle.manifest.variants),
        "added": _added(before, bundle),
        **_records(bundle.manifest, names),
        "known": list(known),
        "not_applied": {key: ignored for key, ignored in known.items() if ignored},
        "elsewhere": _elsewhere(bundle, names),
        "mended": list(_mended(before, bundle)),
        "made_otherwise": _made_otherwise(before, bundle),
        "lost": {"/".join(key): bundle.lost_reason(*key) for key in bundle.lost},
    }


def _print_added(before: Bundle, bundle: Bundle, names: Sequence[str], known: Mapping[str, list[str]]) -> None:
    manifest, added = bundle.manifest, sum(_added(before, bundle).values())
    print(f"{bundle.path}: {', '.join(manifest.variants)}; {added / 1e6:.1f} MB added")
    for key, ignored in known.items():
        print(f"{key} was there already and stays as it was made{_ignored_in_words(bundle, key, ignored)}")
    otherwise = _made_otherwise(before, bundle)
    for key, files in _mended(before, bundle).items():
        how = f"; made otherwise than what was lost: {otherwise[key]}" if key in otherwise else ""
        print(f"{key} was made again: it lacked {', '.join(files)}{how}")
    for name, target in bundle.lost:
        print(f"{name}/{target} is damaged: {bundle.lost_reason(name, target)}")
    for name, result in _parity(manifest, names).items():
        print(f"{name}: error {result.max_rel_error:.1e} against {result.reference} (limit {result.limit:.0e})")
    for name in dict.fromkeys(names):
        quality = manifest.variants[name].quality
        if quality is not None:
            print(f"{name}: {_cost(quality)}; accel report {bundle.path} shows more")
    for name, engines in _elsewhere(bundle, names).items():
        print(f"{name}: nothing here runs it; {engines}")


def _not_applied(options: Namespace, made: Quantization | None) -> list[str]:
    """Options that a variant which is there already does not heed, but for an algorithm that made it."""
    given = [name for name in (*_PASSED, "keep") if getattr(options, name) is not None]
    heeded = set()
    if options.algorithm == "auto" or (made is not None and options.algorithm == made.algorithm):
        heeded.add("algorithm")
    if options.max_q_drop is not None or options.min_cosine is not None:  # these hold it too, on that text
        heeded.add("text")
    return [_as_option(name) for name in given if name not in heeded]


def _ignored_in_words(bundle: Bundle, key: str, ignored: Sequence[str]) -> str:
    """Goes on after what stays as it was made."""
    if not ignored:
        return ""
    name, _, target = key.partition("/")
    others = [other for other in bundle.full_manifest.variants[name].graphs if other != target]
    which = f" --target {target} (what it has for {', '.join(others)} stays as it is)" if others else ""
    command = f"accel quantize {bundle.path} --drop {name}{which}"
    return f"; not applied: {', '.join(ignored)}. To make it otherwise, drop it first: {command}"


def _elsewhere(bundle: Bundle, names: Sequence[str]) -> dict[str, str]:
    """Variants that no engine of this machine runs -> what runs them, and where."""
    from accel.capabilities import probe
    from accel.engines import ENGINES

    found, available = {}, {engine.name for engine in probe().engines if engine.available}
    for name in dict.fromkeys(names):
        able = [engine for engine in ENGINES if engine.target in bundle.variant(name).graphs]
        reasons = {engine.name: engine.probe(bundle, name) for engine in able if engine.device == "cpu"}
        if None in reasons.values() or any(engine.device == "cuda" and engine.name in available for engine in able):
            continue
        parts = [f"{engine}: {reason}" for engine, reason in reasons.items()]
        gpu = [engine.name for engine in able if engine.device == "cuda"]
        if gpu:
            least = " of sm89 or newer" if name.startswith("fp8") else ""
            whose = "" if gpu == ["tensorrt", "rtx"] else "tensorrt and rtx "
            built = f" ({whose}with engines that accel build makes)" if "rtx" in gpu else ""
            parts.append(f"for {', '.join(gpu)} on an NVIDIA GPU{least}{built}")
        found[name] = "; ".join(parts)
    return found


def _records(manifest: Manifest, names: Sequence[str]) -> dict[str, object]:
    quality = {name: manifest.variants[name].quality for name in names}
    return {
        "parity": to_dict(_parity(manifest, names)),
        "quality": {name: to_dict(found) for name, found in quality.items() if found is not None},
    }


def _parity(manifest: Manifest, names: Sequence[str]) -> dict:
    return {name: result for name, result in manifest.parity.items() if name.partition("/")[0] in names}


def _cost(quality: Quality) -> str:
    """What a variant costs, in a line."""
    smaller = f"{quality.reference_size.bytes / quality.size.bytes:.2f} x smaller"
    if quality.likelihood is not None:
        return f"{smaller}, Q {quality.likelihood.difference:+.4f} per token over {quality.likelihood.tokens:,} tokens"
    if quality.encoder is not None:
        return f"{smaller}, mean cosine to fp32 {quality.encoder.cosine_mean:.4f} over {quality.encoder.texts} texts"
    return smaller


def _read_keep(given: Sequence[str] | None) -> dict[str, int] | None:
    """``PATTERN=BITS`` arguments."""
    if not given:
        return None
    kept = {}
    for text in given:
        pattern, _, bits = text.rpartition("=")
        if not pattern or not bits.isdigit():
            remedy = "Write PATTERN=BITS, for example --keep '*.down_proj.weight=8'"
            raise InputError(f"{text!r} keeps nothing", where="--keep", remedy=remedy)
        kept[pattern] = int(bits)
    return kept


__all__ = ["quantize"]
