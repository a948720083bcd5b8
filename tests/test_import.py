from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

import accel

ROOT = Path(accel.__file__).parents[1]
HEAVY = {
    "torch", "transformers", "onnxruntime", "onnx", "onnx_ir", "onnxscript", "tensorrt", "triton", "tokenizers",
    "rich", "jinja2", "yaml", "numpy", "sentence_transformers", "ray",
}  # fmt: skip


def run(code: str) -> str:
    command = [sys.executable, "-c", f"import sys; sys.path.insert(0, {str(ROOT)!r}); {code}"]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def heavy_modules_after(statement: str) -> set[str]:
    loaded = run(f"{statement}; print(*sorted(sys.modules))").split()
    return HEAVY & {name.partition(".")[0] for name in loaded}


def test_import_is_fast() -> None:
    code = "import time; t = time.perf_counter(); import accel; print(time.perf_counter() - t)"
    best = min(float(run(code)) for _ in range(5))
    assert best < 0.1, f"import accel took {best * 1e3:.0f} ms"


def test_telemetry_of_onnxruntime_is_off_unless_it_is_asked_for() -> None:
    """ONNX Runtime looks at the variable when it is imported, which accel does later."""
    show = "import os, accel; print(os.environ['ORT_DISABLE_TELEMETRY'])"
    assert run(f"import os; os.environ.pop('ORT_DISABLE_TELEMETRY', None); {show}") == "1\n"
    assert run(f"import os; os.environ['ORT_DISABLE_TELEMETRY'] = '0'; {show}") == "0\n"


def test_import_pulls_in_no_heavy_module() -> None:
    assert heavy_modules_after("import accel") == set()


@pytest.mark.parametrize(
    ("module", "allowed"),
    [
        ("accel.cli", set()),
        ("accel.bundle", set()),
        ("accel.recipe", set()),
        ("accel.capabilities", set()),
        ("accel.runtime.load", {"numpy"}),
    ],
)
def test_modules_import_only_what_they_need(module: str, allowed: set[str]) -> None:
    assert heavy_modules_after(f"import {module}") <= allowed


def test_names_are_lazy_and_known() -> None:
    assert {"export", "load", "__version__"} <= set(dir(accel))
    assert run("import accel; print('export' in vars(accel), callable(accel.load), 'load' in vars(accel))").split() == [
        "False",
        "True",
        "True",
    ]
    with pytest.raises(AttributeError, match="no attribute 'laod'"):
        accel.laod  # noqa: B018


def test_init_is_short_and_the_version_is_the_package_s() -> None:
    assert len((ROOT / "accel" / "__init__.py").read_text().splitlines()) < 50
    assert re.fullmatch(r"\d+\.\d+\.\d+", accel.__version__)
