from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnxruntime
import pytest

from accel.engines.gpu_memory import OutOfMemoryError
from accel.engines.ort_cuda.provider import Provider, run_error
from accel.engines.ort_cuda.rows import RowCopier
from accel.errors import EngineBrokenError, EngineError, EngineUnavailableError
from tests.engines.ort_cuda.gpu import needs_gpu
from tests.engines.ort_cuda.stand_in import CPU

MESSAGES = {
    "BFCArena::AllocateRawInternal Failed to allocate memory for requested buffer of size 96": OutOfMemoryError,
    "CUDA failure 2: out of memory ; GPU=0": OutOfMemoryError,
    "CUDA failure 700: an illegal memory access was encountered ; GPU=0": EngineBrokenError,
    "CUBLAS failure 3: CUBLAS_STATUS_ALLOC_FAILED": OutOfMemoryError,
    "CUBLAS failure 13: CUBLAS_STATUS_EXECUTION_FAILED": EngineBrokenError,
    "CUDNN failure 5000: CUDNN_STATUS_EXECUTION_FAILED": EngineBrokenError,
    "Non-zero status code returned while running Gather node": EngineError,
}


@pytest.mark.parametrize("message", MESSAGES)
def test_what_failures_mean(message: str) -> None:
    found = run_error(RuntimeError(message), "decoder step")
    assert type(found) is MESSAGES[message] and found.where == "decoder step" and message in str(found)
    assert run_error(found, "elsewhere") is found


def ort_with(session: Any) -> Any:
    """An ``onnxruntime`` whose sessions are made by ``session``."""
    fields = {name: getattr(onnxruntime, name) for name in ("SessionOptions", "GraphOptimizationLevel", "OrtValue")}
    return SimpleNamespace(InferenceSession=session, **fields)


def test_settings() -> None:
    seen: list[Any] = []

    def open_session(graph: str, options: Any, providers: list[Any], enable_fallback: int) -> Any:
        seen.append((graph, providers, enable_fallback))
        return SimpleNamespace(get_providers=lambda: ["CUDAExecutionProvider", "CPUExecutionProvider"])

    provider = Provider(ort_with(open_session), index=1)
    provider.open(Path("graph.onnx"), capture=True)
    ((graph, ((name, settings),), fallback),) = seen
    assert (graph, name, fallback) == ("graph.onnx", "CUDAExecutionProvider", 0)
    assert (settings["device_id"], settings["enable_cuda_graph"]) == ("1", "1")
    provider.open(Path("graph.onnx"))
    assert seen[1][1][0][1]["enable_cuda_graph"] == "0"


def test_a_provider_that_does_not_load_is_no_cpu() -> None:
    """ONNX Runtime writes a warning and runs everything on the CPU."""
    session = SimpleNamespace(get_providers=lambda: ["CPUExecutionProvider"])
    with pytest.raises(EngineUnavailableError, match="could not start CUDA.*would run on CPUExecutionProvider.*doctor"):
        Provider(ort_with(lambda *_, **__: session)).open(Path("graph.onnx"))


@pytest.mark.parametrize(
    ("message", "kind"),
    [("CUDA failure 2: out of memory", OutOfMemoryError), ("CUDA failure 35: driver too old", EngineUnavailableError)],
)
def test_failures_to_open(message: str, kind: type[Exception]) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise RuntimeError(message)

    with pytest.raises(kind, match=message) as caught:
        Provider(ort_with(fail)).open(Path("graph.onnx"))
    assert not isinstance(caught.value, EngineBrokenError), "nothing ran yet"


def test_allocating_more_than_there_is() -> None:
    with pytest.raises(OutOfMemoryError, match="allocating device memory"):
        CPU.allocate((1 << 20, 1 << 20, 1 << 10), "float32")


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("provider", [CPU, pytest.param(None, marks=[needs_gpu, pytest.mark.gpu])], ids=["cpu", "cuda"])
def test_rows_are_copied(dtype: str, provider: Provider | None) -> None:
    provider = provider or Provider(onnxruntime)
    size, held = (4, np.float32) if dtype == "float32" else (2, np.float16)
    value = provider.upload(np.arange(24).astype(held).reshape(3, 8))
    copier = RowCopier(provider, dtype)  # bytes are copied: the type only says how many
    copier.copy(value.data_ptr() + 2 * 8 * size, value.data_ptr(), 8)
    assert value.numpy().astype(int).tolist() == [[*range(16, 24)], [*range(8, 16)], [*range(16, 24)]]
