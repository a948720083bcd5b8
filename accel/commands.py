"""What each subcommand of ``accel`` does, given its parsed options. Returns the exit code."""

from __future__ import annotations

import json
import sys
import time
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import accel
from accel.errors import InputError, StorageError
from accel.progress import phases_on_stderr

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

Command = Callable[[Namespace], int]
GENERATION = (
    *("max_new_tokens", "min_new_tokens", "do_sample", "temperature", "top_k", "top_p", "min_p"),
    *("repetition_penalty", "stop", "seed", "num_return_sequences"),
)
MAX_SIMILARITIES = 20  # texts whose similarities still make a readable table


@phases_on_stderr()
def export(options: Namespace) -> int:
    """Exports a model and says what the bundle holds."""
    from accel.bundle import Bundle
    from accel.recipe import read_recipe
    from accel.schema import to_dict

    recipe: Any = options.recipe
    if options.no_parity:
        recipe = read_recipe(recipe) if recipe is not None else {}
        recipe["parity"] = {**recipe.get("parity", {}), "enabled": False}
    choices = {name: getattr(options, name) for name in ("task", "overwrite", "trust_remote_code", "max_positions")}
    choices["variants"] = options.variant or ()
    started = time.perf_counter()
    accel.export(options.model, options.out, recipe, **choices)
    manifest = Bundle.open(options.out).manifest
    size = sum(entry.size for entry in manifest.files.values())
    seconds = time.perf_counter() - started
    if options.json:
        found = {"path": str(options.out), "bytes": size, "seconds": seconds, "arch": to_dict(manifest.arch)}
        found |= {"variants": list(manifest.variants), "parity": to_dict(manifest.parity), "notes": manifest.notes}
        print(json.dumps(found))
        return 0
    arch = manifest.arch
    print(f"{options.out}: {arch.architecture}, {arch.task}, {arch.parameters / 1e6:.1f} M parameters")
    print(f"{size / 1e6:.1f} MB in {seconds:.1f} s")
    for target, parity in manifest.parity.items():
        print(f"{target}: error {parity.max_rel_error:.1e} against {parity.reference} (limit {parity.limit:.0e})")
    for note in manifest.notes:
        print(f"note: {note}")
    return 0


def run(options: Namespace) -> int:
    """Generates text, streaming it."""
    prompt = options.prompt if options.prompt is not None else sys.stdin.read()
    _check_kind(options.bundle, "decoder", "accel embed")
    if options.system is not None and not options.chat:
        raise InputError("A system message needs a chat", where="--system", remedy="Add --chat")
    choices = {name: getattr(options, name) for name in GENERATION if getattr(options, name) is not None}
    messages = [{"role": "system", "content": options.system}] if options.system is not None else []
    messages.append({"role": "user", "content": prompt})
    with _load(options, capacity=options.capacity) as model:
        if options.json or choices.get("num_return_sequences", 1) != 1:
            results = model.chat(messages, **choices) if options.chat else model.generate(prompt, **choices)
            return _print_results(results if isinstance(results, list) else [results], model, options.json)
        stream = model.stream_chat(messages, **choices) if options.chat else model.stream(prompt, **choices)
        if not options.chat:
            print(prompt, end="", flush=True)
        _print_stream(stream, model.engine.name)
    return 0


def embed(options: Namespace) -> int:
    """Embeds texts; prints their similarities or writes the vectors."""
    import numpy as np

    texts = [*options.texts, *_read_lines(options.file)]
    if not texts:
        raise InputError("There are no texts", where="accel embed", remedy="Give texts, or --file")
    if options.out is not None and options.out.suffix not in (".npy", ".json"):
        what = f"The output format {options.out.suffix!r} is unknown"
        raise InputError(what, where="--out", remedy="Name a file that ends in .npy or .json")
    _check_kind(options.bundle, "encoder", "accel run")
    choices = {name: getattr(options, name) for name in ("pooling", "normalize", "batch_size", "prompt_name")}
    with _load(options) as model:
        vectors = model.embed(texts, **choices)
        similarities = model.similarity(vectors, vectors)
    if options.out is not None:
        try:
            if options.out.suffix == ".npy":
                np.save(options.out, vectors)
            else:
                options.out.write_text(json.dumps(vectors.tolist()) + "\n", encoding="utf-8")
        except OSError as error:
            what = f"The vectors cannot be written: {error.strerror}"
            raise StorageError(what, where=str(options.out), remedy="Give another path") from error
    if options.json:
        print(json.dumps({"shape": list(vectors.shape), "embeddings": vectors.tolist()}))
    elif options.out is not None:
        print(f"{options.out}: {vectors.shape[0]} vectors of {vectors.shape[1]} numbers")
    else:
        _print_similarities(texts, similarities)
    return 0


def inspect(options: Namespace) -> int:
    """Shows what a bundle holds."""
    from accel.bundle import Bundle
    from accel.inspection import inspect as inspect_bundle
    from accel.inspection import render_page, render_text

    bundle = Bundle.open(options.bundle, verify=options.verify)
    inspection = inspect_bundle(bundle)
    if options.html is not None:
        _write_page(options.html, render_page(inspection))
    if options.json:
        print(inspection.to_json())
    elif options.html is None:
        print(render_text(inspection))
    else:
        print(options.html)
    if options.verify and not options.json:
        files = bundle.manifest.files
        read = sum(entry.size for entry in files.values())
        print(f"Verified: {len(files)} files of {read / 1e6:.1f} MB are what the manifest says", file=sys.stderr)
    return 0


@phases_on_stderr()
def report(options: Namespace) -> int:
    """Shows how a bundle's variants compare with fp32."""
    from accel.bundle import Bundle
    from accel.quality import Gate, render_page
    from accel.quality.text import print_report

    bundle, gate = Bundle.open(options.bundle), Gate(options.max_q_drop, options.min_cosine)
    gate.check(bundle.manifest.arch.kind)  # before anything is measured
    _check_page(options.html)
    names = ("variant", "text", "measure", "save", "engine", "device", "threads", "max_tokens", "new_tokens")
    found = accel.report(bundle, **{name: getattr(options, name) for name in names})
    if options.html is not None:
        _write_page(options.html, render_page(found))
    if options.json:
        print(found.to_json())
    elif options.html is None:
        print_report(found)
    else:
        print(options.html)
    found.hold(gate)
    return 0


def doctor(options: Namespace) -> int:
    """Shows what this machine can run; 1 when no engine does."""
    from accel.capabilities import as_json, probe
    from accel.doctor import print_report

    found = probe()
    if options.json:
        print(json.dumps(as_json(found)))
    else:
        print_report(found)
    return 0 if any(engine.available for engine in found.engines) else 1


@phases_on_stderr()
def bench(options: Namespace) -> int:
    """Measures a bundle's engines on this machine, beside eager PyTorch where that is installed."""
    from accel.bench import SHAPES
    from accel.bench import bench as measure

    names = ("rounds", "threads", "prompt_tokens", "new_tokens", "compare", "limits", "batch", "device", "store")
    choices = {name: getattr(options, name) for name in names}
    choices["show_progress"] = None if options.json else True  # it takes minutes, also where stderr is a file
    report = measure(options.bundle, shapes=options.shapes or SHAPES, **choices)
    print(json.dumps(report.to_json()) if options.json else report)
    return 0


def _load(options: Namespace, **more: Any) -> Any:
    """The encoder or decoder; ``_check_kind`` told which."""
    names = ("engine", "device", "variant", "threads", "strict", "store")
    return accel.load(options.bundle, **{name: getattr(options, name) for name in names}, **more)


def _check_kind(path: Path, kind: str, other: str) -> None:
    """Refuses the wrong kind of bundle before its weights are read."""
    from accel.bundle import Bundle

    arch = Bundle.open(path).manifest.arch
    if arch.kind != kind:
        what = f"The bundle holds {arch.architecture}, which is no {kind}"
        raise InputError(what, where=str(path), remedy=f"Use {other}")


def _check_page(path: Path | None) -> None:
    """Refuses a path that no page can be written to, before the work is done."""
    if path is not None and (path.is_dir() or not path.absolute().parent.is_dir()):
        what = "it is a directory" if path.is_dir() else "its directory does not exist"
        raise StorageError(f"The page cannot be written: {what}", where=str(path), remedy="Give another path")


def _write_page(path: Path, page: str) -> None:
    try:
        path.write_text(page, encoding="utf-8")
    except OSError as error:
        what = f"The page cannot be written: {error.strerror}"
        raise StorageError(what, where=str(path), remedy="Give another path") from error


def _print_stream(stream: Any, engine: str) -> None:
    for piece in stream:
        print(piece, end="", flush=True)
    print()
    timings, reason = stream.result.timings, stream.result.finish_reason
    speed = f"{timings.tokens} tokens at {timings.tokens_per_second or 0.0:.1f} tokens/s"
    print(
        f"[{engine}: {speed}, the first after {timings.first_token or 0.0:.2f} s; ended by {reason}]", file=sys.stderr
    )


def _print_results(results: list[Any], model: Any, as_json: bool) -> int:
    from dataclasses import asdict

    if as_json:
        found = {"results": [asdict(result) for result in results], "engine": asdict(model.engine)}
        print(json.dumps({**found, "fallbacks": [asdict(fallback) for fallback in model.fallbacks]}))
        return 0
    for number, result in enumerate(results):
        print(f"--- {number + 1} ({result.finish_reason})\n{result.text}")
    return 0


def _read_lines(path: Path | None) -> list[str]:
    if path is None:
        return []
    try:
        return [line for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    except OSError as error:
        what = f"The texts cannot be read: {error.strerror}"
        raise InputError(what, where=str(path), remedy="Check the path") from error
    except UnicodeDecodeError as error:
        raise InputError("The texts are not UTF-8", where=str(path), remedy="Convert the file") from error


def _print_similarities(texts: list[str], similarities: NDArray[np.float32]) -> None:
    shown = min(len(texts), MAX_SIMILARITIES)
    for text, row in zip(texts[:shown], similarities[:shown, :shown]):
        print(" ".join(f"{value:6.3f}" for value in row) + f"   {text[:60]}")
    if shown < len(texts):
        print(f"(the first {shown} of {len(texts)} texts; --out writes all vectors)")


__all__ = ["Command", "bench", "doctor", "embed", "export", "inspect", "report", "run"]
