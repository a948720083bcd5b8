"""What integer weights cost SmolLM2-135M made hard: Q = mean log p over docstrings of the standard library.

    PYTHONPATH=.:kernels python -m tests.compress.smollm2_quality BUNDLE OUT.json w4g32:gptq:8 w4g32:rtn:4 w8g128:rtn:8

A case is scheme:algorithm:head bits (``a``: measured); ``nearest`` is rounding without a search for scales. Results
are added to OUT.json. Text: docstrings of every second top-level module of the standard library (in alphabetical
order), in windows of 512 tokens. Calibration: the built-in text, or with ``--calibration docstrings`` the docstrings of
the other modules.
"""

from __future__ import annotations

import argparse
import ast
import json
import math
import sysconfig
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from numpy.typing import NDArray

from accel.bundle import Bundle
from accel.compress.calibrate import feeds_of
from accel.compress.layers import find_layers
from accel.compress.quantize import quantize_graph
from accel.compress.report import QuantizationReport
from accel.compress.rtn import round_to_nearest
from accel.compress.texts import Calibration, resolve_calibration
from accel.compress.weights import read_weight, write_quantized
from accel.graph.evaluation.torch_graph import TorchGraph
from accel.graph.quantized_nodes import spell_quantized
from accel.graph.save import load_canonical
from accel.runtime.text import Tokenizer
from accel.scheme import parse_scheme
from accel.spec import ArchSpec
from tests.compress.harden import harden

WINDOW, CALIBRATION_WINDOW = 512, 256
Windows = list[NDArray[np.int64]]


def docstrings() -> dict[str, str]:
    """The docstrings of 200 characters and more of each top-level module, by its name."""
    found = {}
    for path in sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py")):
        nodes = ast.walk(ast.parse(path.read_text("utf-8")))
        kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
        texts = [ast.get_docstring(node) or "" for node in nodes if isinstance(node, kinds)]
        texts = [text for text in texts if len(text) >= 200]
        if texts:
            found[path.stem] = "\n\n".join(texts)
    return found


def windows(texts: Sequence[str], tokenizer: Tokenizer, length: int, count: int) -> Windows:
    """Windows at even distances in the texts' tokens."""
    ids = [token for text in texts for token in tokenizer.encode(text + "\n\n")]
    whole = [np.array(ids[at : at + length]) for at in range(0, len(ids) - length + 1, length)]
    step = max(1, len(whole) // count)
    return whole[::step][:count]


def log_likelihoods(model: ir.Model, arch: ArchSpec, rows: Windows) -> Iterator[NDArray[np.float32]]:
    """Of each window's tokens but the first."""
    graph = TorchGraph(model)
    for row in rows:
        logits = torch.from_numpy(graph.run(feeds_of(model, arch, row, logits=True))["logits"][:-1])
        yield torch.log_softmax(logits, -1).gather(1, torch.from_numpy(row[1:, None])).squeeze(1).numpy()


def quantized(
    model: ir.Model, arch: ArchSpec, case: str, calibration: Calibration
) -> tuple[ir.Model, QuantizationReport | None]:
    """The model of a case; rounding without a search has no report."""
    scheme_name, algorithm, head = case.split(":")
    scheme, bits = parse_scheme(scheme_name), None if head == "a" else int(head)
    if algorithm != "nearest":
        result, report = quantize_graph(model, arch, scheme, algorithm, calibration, head_bits=bits)
        spell_quantized(result, scheme.activations, report.input_scales)
        return result, report
    result = model.clone()
    for layer in find_layers(result, arch)[0]:
        width = bits if layer.role in ("head", "tied") else 8 if layer.role == "table" else scheme.weight_bits
        assert width is not None
        write_quantized(layer, round_to_nearest(read_weight(layer), width, scheme.group, search=False))
    return result, None


def measure(case: str, hard: ir.Model, arch: ArchSpec, calibration: Calibration, rows: Windows, reference: Any) -> Any:
    """One case as a record."""
    started, cpu = time.perf_counter(), time.process_time()
    result, report = quantized(hard, arch, case, calibration)
    seconds, cpu = time.perf_counter() - started, time.process_time() - cpu
    found = list(log_likelihoods(result, arch, rows))
    differences = np.array([a.mean() - b.mean() for a, b in zip(found, reference)])
    record = {
        "case": case, "calibration": calibration.name, "tokens": sum(map(len, found)),
        "q_fp32": float(np.concatenate(reference).mean()), "q_drop": float(-differences.mean()),
        "q_drop_95": float(1.96 * differences.std(ddof=1) / math.sqrt(len(differences))),
        "seconds": round(seconds, 1), "cpu_seconds": round(cpu, 1),
    }  # fmt: skip
    if report is not None:
        kinds: dict[str, list[float]] = {}
        for layer in report.layers:
            kinds.setdefault(layer.name.split(".")[-2], []).append(layer.error)
        record |= {
            "calibration_tokens": report.calibration_tokens, "megabytes": round(report.bytes_after / 1e6, 1),
            "bits_per_weight": round(report.bits_per_weight, 2), "notes": report.notes, "error_of": report.error_of,
            "errors": {kind: float(np.mean(errors)) for kind, errors in kinds.items()},
            "worst": {layer.name: layer.error for layer in report.worst(5)},
        }  # fmt: skip
    return record


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("case", nargs="+")
    parser.add_argument("--windows", type=int, default=40)
    parser.add_argument("--calibration", default="built-in", choices=("built-in", "docstrings"))
    options = parser.parse_args()
    bundle = Bundle.open(options.bundle)
    arch, tokenizer = bundle.manifest.arch, Tokenizer.from_bundle(bundle)
    model = load_canonical(bundle.file("canonical.onnx"))
    hard, texts = harden(model), docstrings()
    rows = windows([texts[name] for name in sorted(texts)[::2]], tokenizer, WINDOW, options.windows)
    calibration = resolve_calibration(None, arch, tokenizer)
    if options.calibration == "docstrings":
        others = windows([texts[name] for name in sorted(texts)[1::2]], tokenizer, CALIBRATION_WINDOW, 32)
        calibration = Calibration("docstrings", tuple(others))
    records = json.loads(options.out.read_text()) if options.out.exists() else {"logits": None, "cases": []}
    kept = options.out.with_suffix(f".reference{options.windows}.npy")
    if not kept.exists():
        np.save(kept, np.array(list(log_likelihoods(hard, arch, rows))))
    reference = list(np.load(kept))
    if records["logits"] is None:
        feeds = feeds_of(model, arch, rows[0], logits=True)
        before, after = (TorchGraph(item).run(feeds)["logits"] for item in (model, hard))
        records["logits"] = {"largest": float(np.abs(before).max()), "difference": float(np.abs(before - after).max())}
    for case in options.case:
        record = measure(case, hard, arch, calibration, rows, reference)
        records["cases"].append(record)
        print(json.dumps(record), flush=True)
        options.out.write_text(json.dumps(records, indent=1) + "\n")


if __name__ == "__main__":
    main()
