"""Every family, the whole way: a PyTorch model is exported, loaded and run, and loses no more than eager fp32."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import pytest
import torch

import accel
from accel.bundle import Bundle
from accel.exporter.families import DECODERS as SUPPORTED_DECODERS
from accel.exporter.families import ENCODERS as SUPPORTED_ENCODERS
from tests.parity.comparison import (
    COURSES,
    Rows,
    decoder_logits,
    decoder_references,
    decoder_yardstick,
    deviation,
    double_precision,
    draw_rows,
    encoder_batches,
    encoder_references,
    excess,
    flatten_real,
    open_decoder,
    run_course,
    select,
    widest,
)
from tests.parity.families import ALL, DECODERS, ENCODERS, FAMILIES, HEADS

BundleOf = Callable[[str], Path]
ModelOf = Callable[[str], Any]
GREEDY = 64


def test_every_supported_family_is_here() -> None:
    assert {family.model_type for family in FAMILIES.values()} == {*SUPPORTED_ENCODERS, *SUPPORTED_DECODERS}


@pytest.mark.parametrize("name", DECODERS)
def test_decoder(name: str, bundle_of: BundleOf, plain_model: ModelOf) -> None:
    """Prefill, chunked prefill, decode, ragged and mixed steps over one cache, on the lowered graph."""
    rows = draw_rows()
    own, exact = decoder_yardstick(plain_model(name), rows)
    session = open_decoder(bundle_of(name))
    worst = {}
    for course, steps in COURSES.items():
        found = run_course(session, rows, steps)
        worst[course] = excess(deviation(np.concatenate(found), select(found, exact)), own)
    session.close()
    assert max(worst.values()) <= 1, f"errors over the limit, eager's own {own}: {worst}"


# Of three layers: projections packed, rotations in the kernel; then norms, fused activations, flat rows. A graph
# that is right but slow passes every other test here.
FUSED = {
    "llama": (3, 3, 7, 3, 1),
    "llama_narrow": (0, 0, 7, 3, 0),  # heads of 24 turn before the kernel
    "qwen2": (3, 3, 7, 3, 1),
    "qwen2_windowed": (3, 3, 7, 3, 1),
    "qwen3": (0, 3, 13, 3, 1),  # norms stand between the projections and the rotation
    "mistral": (3, 3, 7, 3, 1),
    "gemma2": (3, 3, 13, 0, 1),  # its GELU has no bias in front
    "gemma3_text": (0, 3, 19, 0, 1),
    "phi3": (3, 3, 7, 3, 1),
    "phi3_partial": (3, 3, 7, 3, 1),
    "gpt2": (3, 0, 0, 3, 1),
    "olmo2": (0, 3, 13, 3, 1),
    "smollm3": (3, 2, 7, 3, 1),  # one layer is not rotated
    "granite": (3, 3, 7, 3, 1),
    "starcoder2": (3, 3, 0, 3, 1),
}


@pytest.mark.parametrize("name", DECODERS)
def test_nothing_is_missed(name: str, bundle_of: BundleOf) -> None:
    passes = Bundle.open(bundle_of(name)).graph("fp32", "ort-cpu").passes
    fused = {key: value for report in passes for key, value in report.fused.items()}
    activations = fused["bias_gelu"] + fused["silu"]
    found = fused["packed_qkv"], fused["rotary_in_attention"], fused["rms_norm"], activations, fused["unit_batch"]
    assert fused["GroupQueryAttention"] == 3 and found == FUSED[name]


@pytest.mark.parametrize("name", DECODERS)
def test_greedy_tokens(name: str, bundle_of: BundleOf, plain_model: ModelOf) -> None:
    """64 greedy tokens of two prompts at once equal eager's, up to the first that fp32 cannot decide."""
    model, prompts = plain_model(name), [draw_rows((12,), 7)[0], draw_rows((3,), 8)[0]]
    with accel.load(bundle_of(name), threads=1, capacity=128, max_batch=2) as decoder:
        results = decoder.generate([prompt.tolist() for prompt in prompts], max_new_tokens=GREEDY, eos_token_id=[])
    for prompt, result in zip(prompts, results):
        expected = _eager_greedy(model, prompt)
        (eager,), (exact,) = decoder_references(model, [np.concatenate([prompt, expected])])
        best = np.sort(exact[len(prompt) - 1 : -1], axis=-1)[:, -2:]
        undecided = np.flatnonzero(best[:, 1] - best[:, 0] <= 2 * np.abs(eager - exact).max())
        decided = int(undecided[0]) if len(undecided) else GREEDY
        assert decided >= GREEDY // 2, "this model's tokens say nothing"
        assert list(result.ids)[:decided] == expected.tolist()[:decided]


def _eager_greedy(model: Any, prompt: np.ndarray) -> np.ndarray:
    """New tokens [64], each the most probable after a whole pass: nothing of a cache can go wrong here."""
    ids = torch.from_numpy(prompt)[None]
    with torch.no_grad():
        for _ in range(GREEDY):
            logits = model(input_ids=ids, use_cache=False, logits_to_keep=1).logits
            ids = torch.cat([ids, logits[:, -1].argmax(-1, keepdim=True)], dim=1)
    return ids[0, len(prompt) :].numpy()


@pytest.mark.parametrize("name", [*ENCODERS, *HEADS])
def test_encoder(name: str, bundle_of: BundleOf, plain_model: ModelOf) -> None:
    """Full and padded batches, one row, one token; the branch without a mask and the one with it."""
    encoder = accel.load(bundle_of(name), threads=1)
    names = [spec.name for spec in Bundle.open(bundle_of(name)).graph("fp32", "ort-cpu").outputs]
    worst = _encoder_excess(plain_model(name), names, lambda feeds: dict(encoder(**feeds)))
    encoder.close()
    assert max(worst.values()) <= 1, f"errors over the limit: {worst}"


def _encoder_excess(model: Any, names: list[str], run: Callable[[dict[str, Any]], dict[str, Any]]) -> dict[str, float]:
    """Error over the limit, per batch."""
    found, eager, exact = {}, {}, {}
    for batch, feeds in encoder_batches(model).items():
        references = encoder_references(model, feeds, names)
        eager[batch], exact[batch] = (flatten_real(reference, feeds) for reference in references)
        found[batch] = flatten_real(run(feeds), feeds)
    own = deviation(np.concatenate(list(eager.values())), np.concatenate(list(exact.values())))
    limits = {batch: widest(own, deviation(eager[batch], exact[batch])) for batch in found}
    return {batch: excess(deviation(found[batch], exact[batch]), limits[batch]) for batch in found}


@pytest.mark.parametrize("name", ["llama", "gemma2", "smollm3", "gpt2", "bert", "modernbert", "mpnet"])
def test_canonical_graph(name: str, bundle_of: BundleOf, plain_model: ModelOf) -> None:
    """The canonical file, its private ops given by their function bodies, on an ONNX Runtime that knows none."""
    bundle, model = Bundle.open(bundle_of(name)), plain_model(name)
    options = ort.SessionOptions()
    options.log_severity_level = 3
    session = ort.InferenceSession(bundle.file("canonical.onnx"), options, providers=["CPUExecutionProvider"])
    if ALL[name].kind == "decoder":
        rows = draw_rows()
        own, exact = decoder_yardstick(model, rows)
        found = _run_canonical(session, bundle, rows, COURSES["rows that join, wait and go"])
        assert excess(deviation(np.concatenate(found), select(found, exact)), own) <= 1
        return
    inputs, names = ([node.name for node in nodes] for nodes in (session.get_inputs(), session.get_outputs()))
    worst = _encoder_excess(
        model, names, lambda feeds: dict(zip(names, session.run(None, {key: feeds[key] for key in inputs})))
    )
    assert max(worst.values()) <= 1, f"errors over the limit: {worst}"


def _run_canonical(session: Any, bundle: Bundle, rows: Rows, steps: list[tuple[int, ...]]) -> list[np.ndarray]:
    names = [node.name for node in session.get_outputs()]
    cache = {
        f"past.{index}.{part}": np.zeros((len(rows), layer.kv_heads, 48, layer.head_dim), np.float32)
        for index, layer in enumerate(bundle.manifest.arch.layers)
        for part in ("key", "value")
    }
    past, found = np.zeros(len(rows), np.int64), [[] for _ in rows]  # type: ignore[var-annotated]
    for step in steps:
        spans = [(int(start), int(start + count)) for start, count in zip(past, step)]
        feeds = {
            "input_ids": np.concatenate([row[a:b] for row, (a, b) in zip(rows, spans)]),
            "position_ids": np.concatenate([np.arange(a, b) for a, b in spans]),
            "past_lengths": past.astype(np.int32),
            "query_lengths": np.array(step, np.int32),
            "logits_positions": np.arange(sum(step)),
            **cache,
        }
        wanted = {node.name for node in session.get_inputs()}
        outputs = dict(zip(names, session.run(None, {key: feeds[key] for key in feeds.keys() & wanted})))
        for parts, part in zip(found, np.split(outputs["logits"], np.cumsum(step)[:-1])):
            parts.append(part)
        cache = {key: outputs[key.replace("past", "present")] for key in cache}
        past = past + np.array(step)
    return [np.concatenate(parts) for parts in found]


def test_reference_is_fp64_throughout(plain_model: ModelOf) -> None:
    """transformers casts norms, softmax and angles to fp32; rounding them would show against a finer reference."""
    model, rows = plain_model("llama"), draw_rows((20,))
    dtypes = set()

    def note(_module: Any, _inputs: Any, output: Any) -> None:
        for part in output if isinstance(output, tuple) else (output,):
            if isinstance(part, torch.Tensor) and part.is_floating_point():
                dtypes.add(part.dtype)

    with double_precision(model) as exact:
        for module in exact.modules():
            module.register_forward_hook(note)
        decoder_logits(exact, rows)
    assert dtypes == {torch.float64}
