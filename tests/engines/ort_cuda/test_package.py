from __future__ import annotations

import sys
from types import SimpleNamespace
from typing import Any

import pytest

from accel import capabilities
from accel.engines.ort_cuda import package
from accel.engines.ort_cuda.package import import_onnxruntime_gpu, is_installed
from accel.errors import DependencyError
from tests.engines.ort_cuda.gpu import needs_gpu


def install(monkeypatch: pytest.MonkeyPatch, module: Any, **versions: str) -> None:
    """These distributions, and this module for ``import onnxruntime``."""
    found = {name.replace("_", "-"): version for name, version in versions.items()}
    monkeypatch.setattr(package, "version_of", found.get)
    monkeypatch.setattr(package, "clash_of", lambda: capabilities.clash_of(found.get))
    monkeypatch.setitem(sys.modules, "onnxruntime", module)
    monkeypatch.setattr(package, "_loaded", package.threading.Event())


def module(version: str = "1.31.1", *providers: str, **more: Any) -> Any:
    names = list(providers or ("CUDAExecutionProvider", "CPUExecutionProvider"))
    return SimpleNamespace(__version__=version, InferenceSession=object, get_available_providers=lambda: names, **more)


def test_usable(monkeypatch: pytest.MonkeyPatch) -> None:
    loaded: list[bool] = []
    good = module(preload_dlls=lambda: loaded.append(True))
    install(monkeypatch, good, onnxruntime_gpu="1.31.1")
    assert is_installed() and import_onnxruntime_gpu() is good and import_onnxruntime_gpu() is good
    assert loaded == [True], "CUDA's libraries are loaded once"


def test_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, None)
    assert not is_installed()
    with pytest.raises(DependencyError, match=r'^onnxruntime-gpu is not installed. Run: pip install "accelrt\[cuda\]"'):
        import_onnxruntime_gpu()


def test_only_the_cpu_flavour(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, module("1.32.0", "CPUExecutionProvider"), onnxruntime="1.32.0")
    with pytest.raises(DependencyError, match="onnxruntime 1.32.0 is installed, which has no CUDA.*pip uninstall -y"):
        import_onnxruntime_gpu()


def test_the_cpu_flavour_shadows_it(monkeypatch: pytest.MonkeyPatch) -> None:
    shadow = module("1.32.0", "CPUExecutionProvider")
    install(monkeypatch, shadow, onnxruntime="1.32.0", onnxruntime_gpu="1.31.1")
    match = "1.32.0 that Python imports has no CUDA provider: onnxruntime 1.32.0 and onnxruntime-gpu 1.31.1 are"
    with pytest.raises(DependencyError, match=match) as caught:
        import_onnxruntime_gpu()
    assert "pip uninstall -y onnxruntime onnxruntime-gpu && pip install" in str(caught.value)


def test_a_build_without_the_provider(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, module("1.31.1", "CPUExecutionProvider"), onnxruntime_gpu="1.31.1")
    with pytest.raises(DependencyError, match=r"1\.31\.1 that Python imports has no CUDA provider\. Run"):
        import_onnxruntime_gpu()


def test_too_old_damaged_and_broken(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, module("1.29.0"), onnxruntime_gpu="1.29.0")
    with pytest.raises(DependencyError, match=r"1\.29\.0 is too old: 1\.31.*--upgrade"):
        import_onnxruntime_gpu()
    install(monkeypatch, SimpleNamespace(), onnxruntime_gpu="1.31.1")
    with pytest.raises(DependencyError, match="damaged"):
        import_onnxruntime_gpu()
    install(monkeypatch, None, onnxruntime_gpu="1.31.1")  # what an import that failed leaves
    with pytest.raises(DependencyError, match="cannot be imported"):
        import_onnxruntime_gpu()


def test_no_cuda_runtime_no_figure(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(package, "_CUDA_RUNTIMES", ("libcudart.so.absent",))
    assert package.free_memory() is None


@needs_gpu
@pytest.mark.gpu
def test_free_memory() -> None:
    import_onnxruntime_gpu()
    found = package.free_memory()
    assert found is not None and 1 << 30 < found < 1 << 40
