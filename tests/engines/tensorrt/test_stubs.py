"""The stubs that the runtime is type-checked against are those of the installed bindings, and catch mistakes."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.engines.tensorrt.stubs import TARGET, generate

ROOT = TARGET.parents[2]


def test_the_stubs_are_up_to_date() -> None:
    trt = pytest.importorskip("tensorrt_rtx")
    assert TARGET.read_text(encoding="utf-8") == generate(trt), "run python -m tests.engines.tensorrt.stubs"


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("engine.get_tensor_shape('x')", ""),
        ("engine.get_tensor_shapes('x')", "has no attribute"),
        ("engine.get_tensor_shape(3)", "incompatible type"),
        ("context.execute_async_v3()", "Missing positional argument"),
        ("context.set_input_shape('x', 3)", "No overload variant"),
        ("engine.device_memory_size_v2 + 'x'", "Unsupported operand"),
    ],
)
def test_they_catch_mistakes(line: str, message: str, tmp_path: Path) -> None:
    api = pytest.importorskip("mypy.api")
    source = tmp_path / "wrong.py"
    head = "import tensorrt_rtx as trt\ndef f(engine: trt.ICudaEngine, context: trt.IExecutionContext) -> None:\n"
    source.write_text(f"{head}    {line}\n")
    run = f"import sys; from mypy import api; print(*api.run({['--cache-dir', str(tmp_path), str(source)]!r}))"
    environment = {**os.environ, "MYPYPATH": str(ROOT / "stubs")}
    found = subprocess.run([sys.executable, "-c", run], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert api is not None and (message in found.stdout if message else "Success" in found.stdout), found.stdout
