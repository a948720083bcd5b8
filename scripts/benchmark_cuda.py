#!/usr/bin/env python3
"""Measures the engines of NVIDIA GPUs, and peers beside them, on one GPU; writes JSON and prints a table.

A decoder of Llama-3.2-1B's shape and an encoder of BERT-base's, with random weights made on the spot; 128 prompt
tokens and 128 new ones. Needs what `.[export]` and `.[cuda]` install, but onnxruntime-gpu in place of onnxruntime;
peers take part where they are installed.

python scripts/benchmark_cuda.py --work /tmp/bench --json benchmarks/cuda_h200.json
python scripts/benchmark_cuda.py --work /tmp/bench --json benchmarks/cuda_h200.json --only encoder   # the rest stays
python scripts/benchmark_cuda.py --json benchmarks/cuda_h200.json --plot benchmarks/cuda_h200.png     # no GPU needed
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import subprocess
import sys
from collections.abc import Callable
from itertools import product
from pathlib import Path
from statistics import median
from time import perf_counter, sleep
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "kernels")]
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import accel  # noqa: E402
from accel.bench.cases import Case  # noqa: E402
from accel.bench.gpu_figures import draw_figures, read_figures  # noqa: E402
from accel.bench.machine import today  # noqa: E402
from accel.bench.roofline import measure_roofline  # noqa: E402
from accel.bundle import Bundle  # noqa: E402
from accel.capabilities import version_of  # noqa: E402
from accel.engines import open_session  # noqa: E402
from accel.errors import AccelError  # noqa: E402
from accel.machine import gpu_models  # noqa: E402

LLAMA = {
    "hidden_size": 2048, "num_hidden_layers": 16, "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 64,
    "intermediate_size": 8192, "vocab_size": 128256, "tie_word_embeddings": True, "max_position_embeddings": 4096,
    "rope_theta": 500000.0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
PROMPT, NEW, CAPACITY, ROUNDS = 128, 128, 512, 5
CALLS, PAUSE = 32, 0.02  # prompts in quick succession, as the peers get theirs; seconds in which host and GPU cool down
DECODER = (("cuda", "fp16"), ("cuda", "w4g128"), ("cuda", "w8g128"), ("ort-cuda", "fp16"))
BATCHES = (1, 32)
SHAPES = ((1, 128), (8, 128), (32, 128), (64, 384))
RAGGED = ((8, 128), (32, 128), (33, 128), (64, 384))  # rows of an eighth of the width, and more, to all of it
DRAWN = {"do_sample": True, "temperature": 0.8, "top_k": 50, "top_p": 0.95, "seed": 0}
# Temperature, top_k, top_p and min_p of draws that are timed alone: few left, many left, and every filter at once.
FILTERS = ((0.8, 50, 0.95, 0.0), (1.0, 0, 1.0, 0.0), (1.0, 0, 0.95, 0.0), (1.0, 20000, 0.9, 0.01), (5.0, 0, 0.5, 0.0))
PARTS = ("decoder", "encoder", "ragged", "sampling", "roofline", "transformers", "genai")
DISTRIBUTIONS = ("torch", "triton", "transformers", "onnxruntime-gpu", "onnxruntime-genai-cuda")
Row = dict[str, Any]


def llama() -> Any:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**LLAMA)).eval()


def bert() -> Any:
    import torch
    from transformers import BertConfig, BertModel

    torch.manual_seed(0)
    return BertModel(BertConfig(), add_pooling_layer=False).eval()


def prepare(work: Path) -> None:
    """Makes the bundles that are missing; nothing compares their numbers here, the tests do."""
    unchecked = {"parity": {"enabled": False}}
    wanted = {
        "encoder": (bert, "feature-extraction", [("cuda", "fp16")]),
        "decoder": (llama, "text-generation", list(DECODER)),
    }
    for name, (build, task, variants) in wanted.items():
        folder = work / name
        if not folder.exists():
            print(f"{folder}: exporting", flush=True)
            accel.export(build(), folder, unchecked, task=task, show_progress=False)
        for target, variant in variants:
            integers: dict[str, Any] = {"algorithm": "rtn", "measure": False} if variant.startswith("w") else {}
            if variant.startswith("w4"):
                integers["head_bits"] = 4
            print(f"{folder}: {variant} for {target}", flush=True)
            accel.add_variant(folder, variant, target=target, check=False, show_progress=False, **integers)


def decoder(work: Path) -> list[Row]:
    """First token, in quick succession and after a pause, and time per token as a caller of ``generate`` sees them.

    In ms on the host's clock.
    """
    rows = []
    for engine, variant in DECODER:
        for batch in BATCHES:
            row: Row = {"engine": engine, "variant": variant, "batch": batch}
            rows.append(say(row | generated(work / "decoder", engine, variant, batch)))
    return rows


def generated(folder: Path, engine: str, variant: str, batch: int, **options: Any) -> Row:
    """As ``generate``, or how it failed."""
    try:
        return generate(folder, engine, variant, batch, **options)
    except AccelError as error:
        return {"failed": str(error)}


def generate(folder: Path, engine: str, variant: str, batch: int, **options: Any) -> Row:
    ids = np.random.default_rng(0).integers(10, 1000, (batch, PROMPT))
    with accel.load(
        folder, device="cuda", engine=engine, variant=variant, capacity=CAPACITY, max_batch=batch
    ) as model:  # fmt: skip
        after_pause, per_token = [], []
        for _ in range(ROUNDS + 2):  # two warm-ups: they compile, measure and record
            sleep(PAUSE)  # the step that ran ahead of the last call's end is over
            result = model.generate(ids, max_new_tokens=NEW, eos_token_id=[], **options)
            timings = result[0].timings
            after_pause.append(1e3 * timings.first_token)
            per_token.append(1e3 * (timings.total - timings.first_token) / (NEW - 1))
        first = [1e3 * model.generate(ids, max_new_tokens=1, **options)[0].timings.first_token for _ in range(CALLS)]
    return {"first_token_ms": first[2:], "first_token_after_pause_ms": after_pause[2:], "per_token_ms": per_token[2:]}


def sampling(work: Path) -> list[Row]:
    """Drawn tokens beside greedy ones as a caller sees them, in ms; and the draw alone, on the GPU, in us."""
    rows = []
    for engine, batch in product(("cuda", "ort-cuda"), BATCHES):
        for name, options in (("greedy", {}), ("drawn", DRAWN)):
            row = {"engine": engine, "variant": "fp16", "batch": batch, "tokens": name}
            rows.append(say(row | generated(work / "decoder", engine, "fp16", batch, **options)))
    for batch in BATCHES:
        for spread in (0.5, 4.0):  # standard deviation of the logits: flat, and peaked
            for filters in FILTERS:
                row = {"draw": filters, "batch": batch, "spread": spread}
                rows.append(say(row | {"draw_us": draw_times(batch, spread, filters)}))
    return rows


def draw_times(batch: int, spread: float, filters: tuple[float, ...]) -> list[float]:
    """Microseconds per draw of ``batch`` rows, in a recorded run of some."""
    import torch
    from accel_kernels.sample import sample, sample_workspace

    count, device = 20, torch.device("cuda", torch.cuda.current_device())
    logits = spread * torch.randn(batch, LLAMA["vocab_size"], generator=torch.Generator().manual_seed(0))
    uniforms = torch.linspace(0, 0.99, batch).tolist()
    draws = torch.tensor([(*filters, uniform) for uniform in uniforms], dtype=torch.float64, device=device)
    logits, out = logits.to(device), torch.zeros(batch, dtype=torch.int64, device=device)
    value, space = torch.zeros(batch, device=device), sample_workspace(batch, LLAMA["vocab_size"], device)
    sample(logits, draws, out, value, space)  # compiles
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(count):
            sample(logits, draws, out, value, space)

    def run() -> None:
        graph.replay()
        torch.cuda.synchronize()

    return [1e3 * milliseconds / count for milliseconds in times(run, 20)]


def encoder(work: Path) -> list[Row]:
    """A forward from NumPy to NumPy, and its recorded run alone, in ms."""
    session: Any = open_session(Bundle.open(work / "encoder"), engine="cuda", variant="fp16").session
    rows = []
    with accel.load(work / "encoder", device="cuda", engine="cuda", variant="fp16") as model:
        for batch, width in SHAPES:
            ids = np.random.default_rng(0).integers(5, 30000, (batch, width))
            feeds = {"input_ids": ids, "attention_mask": np.ones_like(ids), "token_type_ids": np.zeros_like(ids)}
            calls = times(lambda feeds=feeds: model(**feeds), 30)  # type: ignore[misc]
            phase = session.operator_times(batch, width)
            rows.append(say({"batch": batch, "tokens": width, "call_ms": calls, "graph_ms": 1e3 * phase.seconds}))
    session.close()
    return rows


def ragged(work: Path) -> list[Row]:
    """A forward of rows of different lengths from NumPy to NumPy, and of full rows beside it, in ms."""
    rows = []
    with accel.load(work / "encoder", device="cuda", engine="cuda", variant="fp16") as model:
        for batch, width in RAGGED:
            ids = np.random.default_rng(0).integers(5, 30000, (batch, width))
            lengths = np.linspace(width // 8, width, batch).astype(int)
            masks = {"full": np.ones_like(ids), "ragged": (np.arange(width) < lengths[:, None]).astype(np.int64)}
            for name, mask in masks.items():
                feeds = {"input_ids": ids * mask, "attention_mask": mask, "token_type_ids": np.zeros_like(ids)}
                calls = times(lambda feeds=feeds: model(**feeds), 30)  # type: ignore[misc]
                row: Row = {"rows": name, "batch": batch, "tokens": width, "real": int(mask.sum())}
                rows.append(say(row | {"call_ms": calls}))
    return rows


def roofline(work: Path) -> Row:
    """How near each phase and operator comes to what the GPU allows."""
    cases = {
        "decoder": (Case("decoder", "decoder", prompt=PROMPT, new=NEW),),
        "encoder": tuple(Case(f"{batch}x{width}", "encoder", batch=batch, seq=width) for batch, width in SHAPES),
    }
    found: Row = {}
    for name, variant in (("decoder", "fp16"), ("decoder", "w4g128"), ("encoder", "fp16")):
        measured = measure_roofline(Bundle.open(work / name), variant, cases[name])
        print(measured, flush=True)
        found["limits"] = vars(measured.limits)
        found[f"{name} {variant}"] = [vars(share) for share in measured.shares]
    return found


def transformers(work: Path) -> list[Row]:
    """Eager, and a static cache with torch.compile."""
    import torch

    model, rows = llama().half().cuda(), []
    for batch in BATCHES:
        ids = torch.randint(10, 1000, (batch, PROMPT), device="cuda")
        for mode in ("eager", "static cache, compiled"):
            options: Row = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0}
            if mode != "eager":
                options["cache_implementation"] = "static"

            def run(count: int, ids: Any = ids, options: Row = options) -> None:
                model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=count, **options)
                torch.cuda.synchronize()

            run(NEW)
            first, whole = (median(times(lambda count=count: run(count), 2)) for count in (1, NEW))  # type: ignore[misc]
            row = {"peer": f"transformers, {mode}", "batch": batch}
            rows.append(say(row | {"first_token_ms": [first], "per_token_ms": [(whole - first) / (NEW - 1)]}))
    encoders = bert().half().cuda()
    compiled = torch.compile(encoders, mode="reduce-overhead")
    for batch, width in SHAPES:
        ids = torch.randint(5, 30000, (batch, width), device="cuda")
        for mode, forward in (("eager", encoders), ("compiled", compiled)):

            def call(forward: Any = forward, ids: Any = ids) -> None:
                with torch.inference_mode():
                    forward(ids, attention_mask=torch.ones_like(ids))
                torch.cuda.synchronize()

            rows.append(
                say({"peer": f"BERT, transformers, {mode}", "batch": batch, "tokens": width, "ms": times(call, 20)})
            )
    return rows


def genai(work: Path) -> list[Row]:
    """onnxruntime-genai, fp16 and int4, with CUDA graphs where it records them."""
    import onnxruntime
    import onnxruntime_genai as og

    onnxruntime.preload_dlls()
    source, rows = work / "checkpoint", []
    if not source.exists():
        save_checkpoint(source)
    for precision in ("fp16", "int4"):
        folder = work / f"genai-{precision}"
        if not folder.exists():
            options = ["-i", source, "-o", folder, "-p", precision, "-e", "cuda", "-c", work / "cache"]
            subprocess.run([sys.executable, "-m", "onnxruntime_genai.models.builder", *options], check=True)
        for batch in BATCHES:
            row: Row = {"peer": f"onnxruntime-genai {precision}", "batch": batch, "graph": batch == 1}
            try:
                row |= generate_genai(og, folder, batch, graph=batch == 1)
            except Exception as error:
                row["failed"] = str(error)[:300]
            rows.append(say(row))
    return rows


def save_checkpoint(folder: Path) -> None:
    """The model with a tokenizer that nobody uses, but the builder copies."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    llama().half().save_pretrained(folder)
    words = Tokenizer(models.WordLevel({f"w{index}": index for index in range(2000)}, unk_token="w0"))
    PreTrainedTokenizerFast(tokenizer_object=words, bos_token="w1", eos_token="w2").save_pretrained(folder)


def generate_genai(og: Any, folder: Path, batch: int, graph: bool) -> Row:
    settings = json.loads((folder / "genai_config.json").read_text())
    for provider in settings["model"]["decoder"]["session_options"]["provider_options"]:
        if "cuda" in provider:
            provider["cuda"]["enable_cuda_graph"] = "1" if graph else "0"
    settings["search"]["max_length"] = CAPACITY
    (folder / "genai_config.json").write_text(json.dumps(settings))
    model = og.Model(str(folder))
    ids = np.random.default_rng(0).integers(10, 1000, (batch, PROMPT)).astype(np.int32)
    first, per_token = [], []
    for _ in range(ROUNDS):
        options = og.GeneratorParams(model)
        length = PROMPT + NEW
        options.set_search_options(max_length=length, min_length=length, do_sample=False, batch_size=batch)
        generator = og.Generator(model, options)
        start = perf_counter()
        generator.append_tokens(ids)
        generator.generate_next_token()
        generator.get_next_tokens()
        told = perf_counter()
        for _ in range(NEW - 1):
            generator.generate_next_token()
        generator.get_next_tokens()
        first.append(1e3 * (told - start))
        per_token.append(1e3 * (perf_counter() - told) / (NEW - 1))
    return {"first_token_ms": first[2:], "per_token_ms": per_token[2:]}


def times(run: Callable[[], object], count: int) -> list[float]:
    """Milliseconds of each of ``count`` calls after four untimed ones."""
    found = []
    for _ in range(4):
        run()
    for _ in range(count):
        start = perf_counter()
        run()
        found.append(1e3 * (perf_counter() - start))
    return found


def say(row: Row) -> Row:
    """Prints a row, of several figures the median."""
    shown = {key: round(median(value), 4) if isinstance(value, list) else value for key, value in row.items()}
    print(", ".join(f"{key} {value}" for key, value in shown.items()), flush=True)
    return row


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, help="bundles and checkpoints; made where missing")
    parser.add_argument("--json", type=Path, help="write the figures here; parts that are not measured stay")
    parser.add_argument("--only", nargs="*", choices=PARTS, default=PARTS, help="parts (default: all); none: prepare")
    parser.add_argument("--plot", type=Path, help="draw what --json holds, and measure nothing")
    options = parser.parse_args(arguments)
    if options.plot and options.json is None:
        parser.error("--plot draws what a file holds, which --json names")
    names, driver = gpu_models()
    helpless = bool(options.only) and not names
    if not options.plot and options.work is None and not helpless:  # no folder would help where there is no GPU
        parser.error("--work says where bundles and checkpoints go")
    try:
        if options.plot:
            draw_figures(options.json, options.plot)
            return 0
        kept = read_figures(options.json)
    except AccelError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if helpless:
        print("there is no NVIDIA GPU here to measure", file=sys.stderr)
        return 1
    versions = {name: version for name in DISTRIBUTIONS if (version := version_of(name))}
    kept |= {"gpu": names[0] if names else "", "driver": driver, "versions": versions, "date": today()}
    kept["model"] = f"Llama-3.2-1B and BERT-base shapes, random weights; prompt {PROMPT}, {NEW} new tokens"
    prepare(options.work)
    measured = (decoder, encoder, ragged, sampling, roofline, transformers, genai)
    parts: dict[str, Callable[[Path], Any]] = dict(zip(PARTS, measured, strict=True))
    for name in options.only:
        try:
            kept[name] = parts[name](options.work)
        except (ImportError, subprocess.CalledProcessError) as error:
            print(f"{name}: left out: {error}")
        gc.collect()
        if options.json:
            options.json.write_text(json.dumps(kept, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
