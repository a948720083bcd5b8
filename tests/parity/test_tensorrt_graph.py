"""The graphs of TensorRT's dialect: fp32 loses no more than eager fp32, fp16 and bf16 no more than eager in them."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
import torch
from numpy.typing import NDArray

from accel.bundle import Bundle
from accel.graph.evaluation.sessions import PaddedDecoder, Run, onnxruntime_run
from accel.graph.evaluation.torch_graph import TorchGraph
from accel.graph.lowering.tensorrt import lower
from accel.graph.save import load_canonical
from accel.spec import OUTPUT_NAMES, ArchSpec
from tests.parity.comparison import (
    COURSES,
    decoder_logits,
    decoder_yardstick,
    deviation,
    draw_rows,
    encoder_batches,
    encoder_outputs,
    encoder_references,
    excess,
    flatten_real,
    run_course,
    select,
    widest,
)
from tests.parity.families import DECODERS, ENCODERS, HEADS

BundleOf = Callable[[str], Path]
ModelOf = Callable[[str], Any]
FLOAT, FLOAT16, BFLOAT16 = ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.BFLOAT16
SLACK = 1.25  # of eager's own error by the mean square; half of the cases lie below 0.8
TORCH = {FLOAT16: torch.float16, BFLOAT16: torch.bfloat16}


def lowered(folder: Path, dtype: ir.DataType) -> tuple[ir.Model, ArchSpec]:
    bundle = Bundle.open(folder)
    arch = bundle.manifest.arch
    model = load_canonical(bundle.file(bundle.graph("fp32", "canonical").file))
    return lower(model, arch, arch.max_positions, dtype)[0], arch


def runs(model: ir.Model, folder: Path) -> dict[str, Run]:
    """The graph on both runtimes."""
    path = folder / "graph.onnx"
    for value in model.graph.initializers.values():  # the weights come along: the file stands elsewhere
        value.const_value = ir.tensor(np.array(value.const_value.numpy()), name=value.name)  # type: ignore[union-attr]
    ir.save(model, path)
    return {"torch": TorchGraph(model).run, "onnxruntime": onnxruntime_run(path, threads=1)}


def decode(run: Run, arch: ArchSpec, dtype: ir.DataType, course: str) -> list[NDArray[np.float32]]:
    return run_course(PaddedDecoder(run, arch, 3, 128, dtype, max_logits=7), draw_rows(), COURSES[course])


@pytest.mark.parametrize("name", DECODERS)
def test_decoder(name: str, bundle_of: BundleOf, plain_model: ModelOf, tmp_path: Path) -> None:
    """Every course of steps, on PyTorch and on ONNX Runtime, with logits asked for in small pieces."""
    model, arch = lowered(bundle_of(name), FLOAT)
    own, exact = decoder_yardstick(plain_model(name), draw_rows())
    worst = {}
    for runtime, run in runs(model, tmp_path).items():
        for course in COURSES:
            found = decode(run, arch, FLOAT, course)
            worst[runtime, course] = excess(deviation(np.concatenate(found), select(found, exact)), own)
    assert max(worst.values()) <= 1, worst


@pytest.mark.parametrize("dtype", TORCH, ids=lambda dtype: dtype.name.lower())
@pytest.mark.parametrize("name", DECODERS)
def test_low_precision_decoder(
    name: str, dtype: ir.DataType, bundle_of: BundleOf, plain_model: ModelOf, tmp_path: Path
) -> None:
    model, arch = lowered(bundle_of(name), dtype)
    plain, rows = plain_model(name), draw_rows()
    _, exact = decoder_yardstick(plain, rows)
    eager = [logits.astype(np.float32) for logits in half_logits(plain, rows, TORCH[dtype])]
    own = deviation(np.concatenate(eager), np.concatenate(exact))
    for runtime, run in low_runs(model, dtype, tmp_path).items():
        found = decode(run, arch, dtype, "rows that join, wait and go")
        assert deviation(np.concatenate(found), select(found, exact)).rms <= SLACK * own.rms, runtime


def low_runs(model: ir.Model, dtype: ir.DataType, folder: Path) -> dict[str, Run]:
    """ONNX Runtime's CPU has no bfloat16 kernels; float16 products it computes in float32."""
    return runs(model, folder) if dtype == FLOAT16 else {"torch": TorchGraph(model).run}


def half_logits(model: Any, rows: list[NDArray], dtype: torch.dtype) -> list[NDArray]:
    return decoder_logits(copy.deepcopy(model).to(dtype).apply(_widen_output), rows)


def half_encoder(model: Any, dtype: torch.dtype) -> Any:
    low = copy.deepcopy(model).to(dtype)
    low.register_forward_hook(lambda _, __, output: _widen(output))
    return low


def _widen_output(module: torch.nn.Module) -> None:
    """Outputs of the head as float32, which NumPy has also where it has no bfloat16."""
    if isinstance(module, torch.nn.Linear):
        return
    if hasattr(module, "lm_head"):
        module.register_forward_hook(lambda _, __, output: _widen(output))


def _widen(output: Any) -> Any:
    for name, value in list(output.items()):
        if isinstance(value, torch.Tensor) and value.is_floating_point():
            setattr(output, name, value.float())
    return output


@pytest.mark.parametrize("name", [*ENCODERS, *HEADS])
def test_encoder(name: str, bundle_of: BundleOf, plain_model: ModelOf, tmp_path: Path) -> None:
    model, arch = lowered(bundle_of(name), FLOAT)
    plain, names = plain_model(name), list(OUTPUT_NAMES[arch.task])
    batches = encoder_batches(plain)
    references = {batch: encoder_references(plain, feeds, names) for batch, feeds in batches.items()}
    flat = {batch: [flatten_real(part, batches[batch]) for part in references[batch]] for batch in batches}
    own = widest(*(deviation(*pair) for pair in flat.values()))
    worst = {}
    for runtime, run in runs(model, tmp_path).items():
        for batch, feeds in batches.items():
            found = flatten_real({key: run(feeds)[key] for key in names}, feeds)
            worst[runtime, batch] = excess(deviation(found, flat[batch][1]), own)
    assert max(worst.values()) <= 1, worst


@pytest.mark.parametrize("dtype", TORCH, ids=lambda dtype: dtype.name.lower())
@pytest.mark.parametrize("name", [*ENCODERS, *HEADS])
def test_low_precision_encoder(
    name: str, dtype: ir.DataType, bundle_of: BundleOf, plain_model: ModelOf, tmp_path: Path
) -> None:
    model, arch = lowered(bundle_of(name), dtype)
    plain, names = plain_model(name), list(OUTPUT_NAMES[arch.task])
    low = half_encoder(plain, TORCH[dtype])
    found = low_runs(model, dtype, tmp_path)
    errors = []
    for feeds in encoder_batches(plain).values():
        _, exact = encoder_references(plain, feeds, names)
        answers = [encoder_outputs(low, feeds, names), *(run(feeds) for run in found.values())]
        target = flatten_real(exact, feeds)
        errors.append([deviation(flatten_real({key: a[key] for key in names}, feeds), target).rms for a in answers])
    theirs, *ours = np.sqrt(np.mean(np.square(errors), axis=0))
    assert max(ours) <= SLACK * theirs, (list(found), ours, theirs)


def edit_constant(model: ir.Model, name: str, factor: float) -> None:
    value = model.graph.initializers[name]
    assert value.const_value is not None
    value.const_value = ir.tensor((value.const_value.numpy() * factor).astype(value.dtype.numpy()), name=name)  # type: ignore[union-attr]


def drop_window(model: ir.Model) -> None:
    for node in [node for node in model.graph if node.op_type == "And"]:
        ir.convenience.replace_all_uses_with(node.outputs[0], node.inputs[0])  # type: ignore[arg-type]


def wrong_scale(model: ir.Model) -> None:
    for name in [name for name in model.graph.initializers if ".scale.value" in name]:
        edit_constant(model, name, 2.0)


def no_softcap(model: ir.Model) -> None:
    for node in [node for node in model.graph if node.op_type == "Tanh"]:
        ir.convenience.replace_all_uses_with(node.outputs[0], node.inputs[0])  # type: ignore[arg-type]


def no_rotation(model: ir.Model) -> None:
    for node in [node for node in model.graph if node.op_type == "RotaryEmbedding"][:2]:
        ir.convenience.replace_all_uses_with(node.outputs[0], node.inputs[0])  # type: ignore[arg-type]


MUTATIONS = [
    ("mistral", drop_window),
    ("llama", wrong_scale),
    ("gemma2", no_softcap),
    ("qwen2", no_rotation),
]


@pytest.mark.parametrize("dtype", TORCH, ids=lambda dtype: dtype.name.lower())
@pytest.mark.parametrize("name,mutate", MUTATIONS, ids=lambda item: getattr(item, "__name__", item))
def test_the_comparison_can_fail(
    name: str, mutate: Callable[[ir.Model], None], dtype: ir.DataType, bundle_of: BundleOf, plain_model: ModelOf
) -> None:
    model, arch = lowered(bundle_of(name), dtype)
    mutate(model)
    plain, rows = plain_model(name), draw_rows()
    _, exact = decoder_yardstick(plain, rows)
    own = deviation(np.concatenate(half_logits(plain, rows, TORCH[dtype])), np.concatenate(exact))
    found = decode(TorchGraph(model).run, arch, dtype, "prefill")
    assert deviation(np.concatenate(found), select(found, exact)).rms > 2 * SLACK * own.rms
