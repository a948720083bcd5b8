"""The wheel with its base requirements and the extra ``cpu`` is enough to run bundles."""

from __future__ import annotations

import json
import subprocess
import sys
import venv
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import accel

ROOT = Path(accel.__file__).parents[1]
RUN = """
import importlib.util, json, sys
for name in ("torch", "transformers", "onnx", "onnxscript"):
    assert importlib.util.find_spec(name) is None, name + " is installed"
import accel, accel_cpu, accel_kernels
assert "site-packages" in accel.__file__, accel.__file__
assert accel_cpu.library_path() is not None, accel_cpu.unavailable_reason()
from accel.recipe import recipe_names
with accel.load(sys.argv[1]) as encoder:
    vectors = encoder.embed(["A cat sits on the mat.", "A kitten rests on a rug.", "Stocks fell on Monday."])
    engine = encoder.engine.name
with accel.load(sys.argv[2]) as decoder:
    result = decoder.generate("hello", max_new_tokens=8, do_sample=False)
    streamed = "".join(decoder.stream("hello", max_new_tokens=8, do_sample=False))
assert not {"torch", "transformers"} & set(sys.modules)
print(json.dumps({
    "similarities": (vectors @ vectors.T).tolist(), "engine": engine, "text": result.text,
    "streamed": streamed, "recipes": recipe_names(), "typed": (importlib.util.find_spec("accel").origin),
}))
"""


def pip(python: Path | str, *arguments: str) -> None:
    done = subprocess.run([python, "-m", "pip", *arguments], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.fixture(scope="module")
def clean_python(made_once: Callable[[str, Callable[[Path], Any]], Path]) -> Path:
    """The interpreter of a virtual environment that holds the wheel, the base and ``cpu``, nothing else."""

    def make(folder: Path) -> None:
        wheels = folder / "wheels"
        source = folder / "source"
        source.mkdir(parents=True)
        for name in ("accel", "kernels", "export_configs", "_build", "setup.py", "pyproject.toml", "LICENSE"):
            (source / name).symlink_to(ROOT / name)  # setuptools writes its build folder beside setup.py
        pip(sys.executable, "wheel", "--no-deps", "--quiet", "--wheel-dir", str(wheels), str(source))
        (wheel,) = wheels.glob("accelrt-*.whl")
        venv.create(folder / "venv", with_pip=True)
        pip(folder / "venv" / "bin" / "python", "install", "--quiet", f"{wheel}[cpu]")

    return made_once("clean", make) / "venv" / "bin" / "python"


@pytest.mark.slow
def test_wheel_runs_bundles_without_torch(clean_python: Path, minilm_bundle: Path, tiny_decoder_bundle: Path) -> None:
    command = [clean_python, "-I", "-c", RUN, minilm_bundle, tiny_decoder_bundle]
    done = subprocess.run(command, capture_output=True, text=True, cwd=clean_python.parent)
    assert done.returncode == 0, done.stderr
    printed = json.loads(done.stdout)
    similar, different = printed["similarities"][0][1], printed["similarities"][0][2]
    assert similar > 0.5 > different
    assert printed["engine"] == "ort-cpu"
    assert printed["streamed"] == printed["text"]
    assert printed["recipes"] == ["decoder", "encoder"]
    assert (Path(printed["typed"]).parent / "py.typed").is_file()
    with accel.load(tiny_decoder_bundle) as decoder:
        assert decoder.generate("hello", max_new_tokens=8, do_sample=False).text == printed["text"]


@pytest.mark.slow
def test_wheel_has_every_module(clean_python: Path) -> None:
    """A folder without ``__init__.py`` is missing from it, however well an editable installation runs."""
    (packages,) = (clean_python.parents[1] / "lib").glob("python*/site-packages")
    for folder in (ROOT / "accel", ROOT / "kernels" / "accel_kernels", ROOT / "kernels" / "accel_cpu"):
        modules = {path.relative_to(folder.parent) for path in folder.rglob("*.py")}
        missing = sorted(str(path) for path in modules if not (packages / path).is_file())
        assert modules and not missing


@pytest.mark.slow
def test_wheel_s_command_runs(clean_python: Path, minilm_bundle: Path) -> None:
    accel_command = clean_python.parent / "accel"
    doctor = subprocess.run([accel_command, "doctor", "--json"], capture_output=True, text=True)
    assert doctor.returncode == 0, doctor.stderr
    report = json.loads(doctor.stdout)
    available = {engine["name"]: engine["available"] for engine in report["engines"]}
    assert available.pop("ort-cpu")
    assert available and not any(available.values()), available
    export = subprocess.run([accel_command, "export", minilm_bundle, "out"], capture_output=True, text=True)
    assert export.returncode == 1
    assert 'pip install "accelrt[export]"' in export.stderr
    assert "Traceback" not in export.stderr
