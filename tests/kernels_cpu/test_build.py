"""Building the library: which compiler, and what is left where there is none."""

from __future__ import annotations

import ctypes
import importlib
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
from accel_cpu import library
from setuptools import Distribution

import accel

ROOT = Path(accel.__file__).parents[1]


@pytest.fixture
def native(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """The module that setup.py builds with."""
    monkeypatch.syspath_prepend(str(ROOT / "_build"))
    for name in ("CXX", "ACCEL_CPU_BUILD"):
        monkeypatch.delenv(name, raising=False)
    yield importlib.import_module("native")
    for name in ("native", "backend"):
        sys.modules.pop(name, None)


def source(folder: Path, text: str) -> list[str]:
    path = folder / "one.cc"
    path.write_text(text)
    return [str(path)]


def test_a_library_is_compiled_and_loads(native: ModuleType, tmp_path: Path) -> None:
    text = 'extern "C" __attribute__((visibility("default"))) int seven() { return 7; }'
    native.compile_library(source(tmp_path, text), tmp_path / "objects", tmp_path / "lib.so")
    assert ctypes.CDLL(str(tmp_path / "lib.so")).seven() == 7


def test_the_compiler_s_words_are_kept(native: ModuleType, tmp_path: Path) -> None:
    with pytest.raises(native.BuildFailure, match=r"Compiling failed: .*\n.*(one\.cc|error)"):
        native.compile_library(source(tmp_path, "int f( {"), tmp_path, tmp_path / "lib.so")


def test_a_compiler_that_cannot_be_run(
    native: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CXX", "/no/such/compiler -O2")
    with pytest.raises(native.BuildFailure, match="/no/such/compiler cannot be run: No such file"):
        native.compile_library(source(tmp_path, ""), tmp_path, tmp_path / "lib.so")


def test_no_compiler_at_all(native: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    monkeypatch.setattr(native, "ZIG", "no_such_compiler_package")
    with pytest.raises(native.BuildFailure, match=r"looked for c\+\+, g\+\+, clang\+\+, the Python package"):
        native.compiler_commands()
    backend = importlib.import_module("backend")
    assert backend.ZIG in backend.get_requires_for_build_wheel()
    assert backend.ZIG in backend.get_requires_for_build_editable()
    monkeypatch.setenv("ACCEL_CPU_BUILD", "0")
    assert backend.ZIG not in backend.get_requires_for_build_wheel()


def test_nothing_is_asked_for_where_there_is_a_compiler(native: ModuleType) -> None:
    backend = importlib.import_module("backend")
    assert native.find_compiler() is None or backend.ZIG not in backend.get_requires_for_build_wheel()


def test_a_failure_is_told_and_breaks_nothing(
    native: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ACCEL_CPU_BUILD", "0")
    package = tmp_path / "accel_cpu"
    package.mkdir()
    (package / library.LIBRARY.name).write_text("of older sources")
    command = native.BuildLibrary(
        Distribution({"ext_modules": [native.extension("kernels/accel_cpu")], "packages": ["accel_cpu"]})
    )
    command.build_lib, command.build_temp = str(tmp_path), str(tmp_path / "temp")
    command.ensure_finalized()
    command.run()
    monkeypatch.setattr(library, "LIBRARY", package / library.LIBRARY.name)
    monkeypatch.setattr(library, "FAILURE", package / library.FAILURE.name)
    assert library.library_path() is None
    assert "ACCEL_CPU_BUILD=0 was set" in str(library.unavailable_reason())
    library._library.cache_clear()
    with pytest.raises(OSError, match="ACCEL_CPU_BUILD=0 was set"):
        library.instruction_set()
    (package / library.FAILURE.name).unlink()
    assert "never compiled" in str(library.unavailable_reason())
    library._library.cache_clear()


def test_the_sources_are_found(native: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    extension = native.extension("kernels/accel_cpu")
    assert {Path(path).name for path in extension.sources} >= {"avx512.cc", "avx2.cc", "portable.cc", "operators.cc"}
    assert any(path.endswith("onnxruntime_c_api.h") for path in extension.depends)
