from __future__ import annotations

import io
from dataclasses import replace

import pytest

from accel import capabilities
from accel.capabilities import Capabilities, EngineStatus, OnnxRuntime, as_json, clash_of, probe
from accel.doctor import missing_commands, print_report
from accel.schema import from_dict


@pytest.fixture(scope="module")
def found() -> Capabilities:
    return probe()


def engine_of(onnxruntime: OnnxRuntime) -> EngineStatus:
    return capabilities._onnxruntime_engine(onnxruntime)


GPU = capabilities.Gpu("NVIDIA L4", "580.1", 23034, "8.9")
GOOD = OnnxRuntime(("onnxruntime 1.32.0",), "1.32.0", ("CPUExecutionProvider",), True, None)


def test_probe_of_this_machine(found: Capabilities) -> None:
    engines = {engine.name: engine for engine in found.engines}
    assert engines["ort-cpu"].available
    assert engines["torch"].available
    assert engines["ort-cpu"].install is None
    assert found.onnxruntime.query_seqlens
    assert "CPUExecutionProvider" in found.onnxruntime.providers
    assert found.cpu.cores >= 1
    packages = {package.name: package for package in found.packages}
    assert packages["torch"].version is not None
    assert packages["torch"].install is None
    assert found.warnings == ()
    assert from_dict(Capabilities, as_json(found), "json") == found


def test_two_flavours_clash() -> None:
    versions = {"onnxruntime": "1.32.0", "onnxruntime-gpu": "1.31.1"}
    names, problem = clash_of(versions.get)
    assert names == ("onnxruntime 1.32.0", "onnxruntime-gpu 1.31.1")
    assert problem is not None
    assert "overwrite each other" in problem
    assert clash_of({"onnxruntime-gpu": "1.31.1"}.get) == (("onnxruntime-gpu 1.31.1",), None)
    status = engine_of(replace(GOOD, distributions=names, problem=problem))
    assert status.install == 'pip uninstall -y onnxruntime onnxruntime-gpu && pip install "accelrt[cpu]"'
    assert "overwrite each other" in status.reason


def test_a_clash_is_a_warning_of_the_probe(monkeypatch: pytest.MonkeyPatch) -> None:
    real = capabilities.version_of
    monkeypatch.setattr(capabilities, "clash_of", lambda: clash_of(lambda n: "1.31.1" if "gpu" in n else real(n)))
    found = probe()
    assert len(found.warnings) == 1
    out = io.StringIO()
    print_report(found, out)
    assert "Clash: onnxruntime" in out.getvalue()
    assert "pip uninstall -y onnxruntime onnxruntime-gpu" in out.getvalue()


@pytest.mark.parametrize(
    ("onnxruntime", "install"),
    [
        (OnnxRuntime((), None, (), False, "not installed"), 'pip install "accelrt[cpu]"'),
        (
            OnnxRuntime(("onnxruntime 1.31.1",), "1.31.1", (), False, "too old"),
            'pip install --upgrade "accelrt[cpu]"',
        ),
        (
            OnnxRuntime(("onnxruntime-gpu 1.31.1",), "1.31.1", (), False, "too old"),
            'pip uninstall -y onnxruntime-gpu && pip install "accelrt[cpu]"',
        ),
    ],
)
def test_unusable_onnxruntime_names_the_command(onnxruntime: OnnxRuntime, install: str) -> None:
    status = engine_of(onnxruntime)
    assert not status.available
    assert status.install == install
    assert status.reason


def test_missing_module_and_broken_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    capabilities.runs_ragged_attention.cache_clear()
    monkeypatch.setattr(capabilities, "_PROBE_GRAPH", "AAAA")
    broken = capabilities.probe_onnxruntime()
    capabilities.runs_ragged_attention.cache_clear()
    assert broken.problem is not None
    assert "query_seqlens" in broken.problem
    monkeypatch.setitem(__import__("sys").modules, "onnxruntime", None)
    absent = capabilities.probe_onnxruntime()
    assert absent.version is None
    assert not engine_of(absent).available


def test_report_names_every_missing_command(found: Capabilities, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    poor = replace(
        found,
        engines=(EngineStatus("ort-cpu", False, "not installed [x]", "pip install a"),),
        packages=tuple(replace(p, version=None, install=f"pip install {p.name}") for p in found.packages),
        gpus=(capabilities.Gpu("NVIDIA H200", "570", 143771, "9.0"),),
    )
    out = io.StringIO()
    print_report(poor, out)
    text = out.getvalue()
    assert ("engine ort-cpu", "pip install a") in missing_commands(poor)
    for _, command in missing_commands(poor):
        assert command in text
    assert "not installed [x]" in text
    assert "NVIDIA H200, 140.4 GiB, compute capability 9.0, driver 570" in text


@pytest.mark.parametrize(
    ("driver", "full", "rtx", "cuda"),
    [
        ("580.65", "tensorrt", "tensorrt-rtx-cu13", "cuda-python>=12.8"),
        ("550.5", "tensorrt-cu12", "tensorrt-rtx-cu12", "cuda-python>=12.8,<13"),  # which does not run CUDA 13
        ("", "tensorrt", "tensorrt-rtx-cu13", "cuda-python>=12.8"),
        (None, None, "tensorrt-rtx-cu13", "cuda-python>=12.8"),  # no GPU: RTX alone can build here
    ],
)
def test_the_commands_for_tensorrt(
    found: Capabilities, monkeypatch: pytest.MonkeyPatch, driver: str | None, full: str | None, rtx: str, cuda: str
) -> None:
    from accel.engines.tensorrt.packages import MINIMUM

    monkeypatch.setattr(capabilities, "version_of", lambda _: None)
    gpus = () if driver is None else (capabilities.Gpu("NVIDIA L4", driver, 23034, "8.9"),)
    packages, engines = capabilities._packages(gpus), capabilities._tensorrt_engines(gpus, None)
    commands = {command: why for why, command in missing_commands(replace(found, packages=packages, engines=engines))}
    least = {name: ".".join(map(str, numbers)) for name, numbers in MINIMUM.items()}
    wanted = [f'pip install "{rtx}>={least["rtx"]}" "{cuda}"']
    wanted += [f'pip install "{full}>={least["tensorrt"]}" "{cuda}"'] if full else []
    assert set(wanted) <= set(commands) and ("tensorrt>=" in str(commands)) is (full == "tensorrt")
    assert "without a GPU" in commands[wanted[0]]
    assert full is None or "pip must reach pypi.nvidia.com" in commands[wanted[1]]


def test_what_is_missing_beside_tensorrt(monkeypatch: pytest.MonkeyPatch) -> None:
    versions = {"tensorrt-cu12": "10.16.0", "tensorrt-rtx-cu12": "1.7.1"}
    monkeypatch.setattr(capabilities, "version_of", versions.get)
    gpus = (GPU,)
    engines = capabilities._tensorrt_engines(gpus, None)
    assert [row.install for row in engines] == ['pip install "cuda-python>=12.8"'] * 2
    rows = {row.name: row for row in capabilities._packages(gpus)}
    assert rows["tensorrt-cu12"].version == "10.16.0" and rows["tensorrt-rtx-cu12"].install is None
    versions["cuda-python"] = "13.0"
    hidden = capabilities._tensorrt_engines(gpus, "CUDA_VISIBLE_DEVICES='' hides")
    assert [(row.available, row.install) for row in hidden] == [(False, None)] * 2  # no package would help


@pytest.mark.parametrize(
    ("gpu", "hidden", "runs", "reason"),
    [
        (True, None, True, "come from the store"),
        (False, None, False, "no NVIDIA GPU or driver"),
        (True, "CUDA_VISIBLE_DEVICES='' hides", False, "1.7.1, but CUDA_VISIBLE_DEVICES='' hides"),
        (False, "no device files", False, "1.7.1, but no device files"),
    ],
)
def test_rtx_and_the_gpu(
    monkeypatch: pytest.MonkeyPatch, gpu: bool, hidden: str | None, runs: bool, reason: str
) -> None:
    monkeypatch.setattr(capabilities, "version_of", lambda name: None if name.startswith("tensorrt-cu") else "1.7.1")
    _, rtx = capabilities._tensorrt_engines((GPU,) if gpu else (), hidden)
    assert rtx.available is runs and reason in rtx.reason


BOTH = ("CUDAExecutionProvider", "CPUExecutionProvider")
FLAVOUR = OnnxRuntime(
    ("onnxruntime-gpu 1.31.1",), "1.31.1", BOTH, False, "onnxruntime 1.31.1 is too old: 1.32 is needed"
)
CLASH = replace(GOOD, distributions=("onnxruntime 1.32.0", "onnxruntime-gpu 1.31.1"), problem="both are installed")
SWAP = 'pip uninstall -y onnxruntime && pip install "accelrt[cuda]"'
ORT_CUDA = {
    "ready": (FLAVOUR, (GPU,), None, True, "onnxruntime-gpu 1.31.1 with its CUDA provider", None),
    "no GPU": (FLAVOUR, (), None, False, "no NVIDIA GPU or driver", None),
    "a hidden GPU": (FLAVOUR, (GPU,), "CUDA_VISIBLE_DEVICES='' hides", False, "CUDA_VISIBLE_DEVICES='' hides", None),
    "the CPU flavour": (GOOD, (GPU,), None, False, "not installed; onnxruntime 1.32.0 has no CUDA", SWAP),
    "the CPU flavour, no GPU": (GOOD, (), None, False, "no NVIDIA GPU or driver", None),
    "shadowed": (
        *(CLASH, (GPU,), None, False, "no CUDA provider: both are installed"),
        'pip uninstall -y onnxruntime onnxruntime-gpu && pip install "accelrt[cuda]"',
    ),
    "too old": (
        *(replace(FLAVOUR, version="1.29.0"), (GPU,), None, False, "1.29.0 is too old: 1.31"),
        'pip install --upgrade "accelrt[cuda]"',
    ),
}


@pytest.mark.parametrize("case", ORT_CUDA)
def test_ort_cuda(case: str) -> None:
    onnxruntime, gpus, hidden, runs, reason, install = ORT_CUDA[case]
    row = capabilities._onnxruntime_cuda_engine(onnxruntime, gpus, hidden)
    assert (row.name, row.available, row.install) == ("ort-cuda", runs, install) and reason in row.reason
    assert row.reason == reason or (gpus and hidden is None), "what no package would mend is all that is said"


def test_what_packages_of_a_gpu_are_for() -> None:
    """The engine ``cuda`` runs without ONNX Runtime's."""
    purposes = {package.name: package.purpose for package in capabilities._packages((GPU,))}
    assert purposes["onnxruntime-gpu"] == "engine ort-cuda"


def test_the_gpu_flavour_is_not_to_be_swapped_for_the_cpus(found: Capabilities) -> None:
    row = engine_of(FLAVOUR)
    assert not row.available and row.install is None and "this one is for ort-cuda" in row.reason
    names = [engine.name for engine in found.engines]
    assert names == ["tensorrt", "rtx", "cuda", "ort-cuda", "ort-cpu", "openvino", "torch"]
