"""What this machine can run, probed, as data; ``accel doctor`` prints it."""

from __future__ import annotations

import base64
import importlib.util
import platform
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from importlib import metadata
from typing import Any

from accel.machine import Cpu, Gpu, Memory, hidden_gpu, probe_cpu, probe_gpus, probe_memory

MINIMUM_ONNXRUNTIME = (1, 32)
MINIMUM_ONNXRUNTIME_GPU = (1, 31)  # the first with CUDA kernels for all that lowered graphs hold
MINIMUM_OPENVINO = (2025, 4)  # the oldest that was tried
CUDA_PROVIDER = "CUDAExecutionProvider"
CUDA_13_DRIVER = (580,)  # the first that runs CUDA 13
# Distributions that install into the one folder onnxruntime/.
ONNXRUNTIME_FLAVOURS = (
    "onnxruntime",
    "onnxruntime-gpu",
    "onnxruntime-directml",
    "onnxruntime-openvino",
    "onnxruntime-qnn",
    "onnxruntime-rocm",
    "onnxruntime-migraphx",
)
# One GroupQueryAttention node with the input query_seqlens: one head of size 8, packed queries, keys and values.
_PROBE_GRAPH = (
    "CAgSADqVAwq+AQoDcWt2CgAKAAoIcGFzdF9rZXkKCnBhc3RfdmFsdWUKCXNlcWxlbnNfawoFdG90YWwKAAoACgAKAAoACgAKAAoACgAKDXF1ZXJ5X3Nl"
    "cWxlbnMSA291dBILcHJlc2VudF9rZXkSDXByZXNlbnRfdmFsdWUiE0dyb3VwUXVlcnlBdHRlbnRpb24qEwoMa3ZfbnVtX2hlYWRzGAGgAQIqEAoJbnVt"
    "X2hlYWRzGAGgAQI6DWNvbS5taWNyb3NvZnQSAWdaGwoDcWt2EhQKEggBEg4KAxIBQgoDEgFTCgIIGFokCghwYXN0X2tleRIYChYIARISCgMSAUIKAggB"
    "CgMSAUMKAggIWiYKCnBhc3RfdmFsdWUSGAoWCAESEgoDEgFCCgIIAQoDEgFDCgIICFoYCglzZXFsZW5zX2sSCwoJCAYSBQoDEgFCWg8KBXRvdGFsEgYK"
    "BAgGEgBaHAoNcXVlcnlfc2VxbGVucxILCgkIBhIFCgMSAUJiGwoDb3V0EhQKEggBEg4KAxIBQgoDEgFTCgIICEIECgAQFEIRCg1jb20ubWljcm9zb2Z0"
    "EAE="
)


@dataclass(frozen=True)
class Package:
    """An optional distribution. ``install`` is the pip command when it is absent and would be of use here."""

    name: str
    version: str | None
    purpose: str
    install: str | None


@dataclass(frozen=True)
class OnnxRuntime:
    """The installed ONNX Runtime.

    Attributes:
        distributions: ``name version`` of every flavour found; more than one is a clash.
        version: What the imported module says; None: it cannot be imported.
        providers: Its execution providers.
        query_seqlens: Whether a ragged attention step gives the right numbers.
        problem: Why it cannot be used, or None.
    """

    distributions: tuple[str, ...]
    version: str | None
    providers: tuple[str, ...]
    query_seqlens: bool
    problem: str | None


@dataclass(frozen=True)
class EngineStatus:
    """Whether an engine runs here; if not, why, and the command that would change it."""

    name: str
    available: bool
    reason: str
    install: str | None


@dataclass(frozen=True)
class Capabilities:
    """Everything ``probe`` found. ``warnings`` are clashes that want a repair though something may run."""

    accel: str
    python: str
    platform: str
    cpu: Cpu
    memory: Memory
    gpus: tuple[Gpu, ...]
    onnxruntime: OnnxRuntime
    packages: tuple[Package, ...]
    engines: tuple[EngineStatus, ...]
    warnings: tuple[str, ...]


def probe() -> Capabilities:
    """Probes this machine. Imports onnxruntime when it is there, and no other heavy module."""
    import accel

    gpus = probe_gpus()
    onnxruntime = probe_onnxruntime()
    warnings = [onnxruntime.problem] if len(onnxruntime.distributions) > 1 and onnxruntime.problem else []
    return Capabilities(
        accel=accel.__version__,
        python=platform.python_version(),
        platform=platform.platform(),
        cpu=probe_cpu(),
        memory=probe_memory(),
        gpus=gpus,
        onnxruntime=onnxruntime,
        packages=_packages(gpus),
        engines=(
            *_tensorrt_engines(gpus, hidden_gpu()),
            _cuda_engine(gpus, hidden_gpu()),
            _onnxruntime_cuda_engine(onnxruntime, gpus, hidden_gpu()),
            _onnxruntime_engine(onnxruntime),
            _openvino_engine(),
            _torch_engine(),
        ),
        warnings=tuple(warnings),
    )


def version_of(distribution: str) -> str | None:
    """The installed version of a distribution, read from its metadata without importing it."""
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def clash_of(versions: Callable[[str], str | None] = version_of) -> tuple[tuple[str, ...], str | None]:
    """The ONNX Runtime flavours that are installed, and what is wrong when there are several."""
    found = tuple(f"{name} {version}" for name in ONNXRUNTIME_FLAVOURS if (version := versions(name)) is not None)
    if len(found) <= 1:
        return found, None
    return found, f"{' and '.join(found)} are installed into the same folder and overwrite each other's files"


def install_export(missing: Sequence[str]) -> str:
    """The pip command for modules that the extra ``export`` brings.

    They are named one by one where it would put onnxruntime over another flavour's files.
    """
    if any(version_of(name) is not None for name in ONNXRUNTIME_FLAVOURS if name != "onnxruntime"):
        return f"pip install {' '.join(missing).replace('_', '-')}"
    return 'pip install "accelrt[export]"'


def probe_onnxruntime() -> OnnxRuntime:
    """Imports onnxruntime and proves that a ragged attention step works."""
    distributions, problem = clash_of()
    try:
        import onnxruntime

        version, providers = str(onnxruntime.__version__), tuple(onnxruntime.get_available_providers())
    except (ImportError, AttributeError) as error:  # AttributeError: what uninstalling one of two flavours leaves
        absent = importlib.util.find_spec("onnxruntime") is None
        problem = problem or ("onnxruntime is not installed" if absent else f"onnxruntime cannot be imported: {error}")
        return OnnxRuntime(distributions, None, (), False, problem)
    ragged = runs_ragged_attention()
    if problem is None and _release(version) < MINIMUM_ONNXRUNTIME:
        problem = f"onnxruntime {version} is too old: 1.32 or newer is needed"
    elif problem is None and not ragged:
        problem = f"onnxruntime {version} does not compute ragged attention (query_seqlens) right"
    return OnnxRuntime(distributions, version, providers, ragged, problem)


@cache
def runs_ragged_attention() -> bool:
    """Runs two rows of different length and past through GroupQueryAttention and compares with NumPy."""
    import numpy as np
    import onnxruntime

    random = np.random.default_rng(0)
    packed = random.standard_normal((2, 2, 24)).astype(np.float32)  # [B, S, queries + keys + values]
    cache_keys, cache_values = random.standard_normal((2, 2, 1, 8, 8)).astype(np.float32)  # each [B, 1, capacity, 8]
    past, new = np.array([0, 3]), np.array([2, 1])
    feeds = {
        "qkv": packed,
        "past_key": cache_keys,
        "past_value": cache_values,
        "seqlens_k": (past + new - 1).astype(np.int32),
        "total": np.array((past + new).max(), np.int32),
        "query_seqlens": new.astype(np.int32),
    }
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.intra_op_num_threads = 1
    try:
        graph = base64.b64decode(_PROBE_GRAPH)
        session = onnxruntime.InferenceSession(graph, options, providers=["CPUExecutionProvider"])
        out = session.run(["out"], feeds)[0]
    except Exception:  # every refusal means the same here: this build cannot do it
        return False
    for row in range(2):
        for slot in range(new[row]):
            keys = np.concatenate([cache_keys[row, 0, : past[row]], packed[row, : slot + 1, 8:16]])
            values = np.concatenate([cache_values[row, 0, : past[row]], packed[row, : slot + 1, 16:]])
            weights = np.exp(keys @ packed[row, slot, :8] / np.sqrt(8))
            if not np.allclose(weights / weights.sum() @ values, out[row, slot], atol=1e-5):
                return False
    return True


def _release(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split(".")[:2] if part.isdigit())


def _onnxruntime_engine(found: OnnxRuntime) -> EngineStatus:
    usable = found.version is not None and found.query_seqlens and _release(found.version) >= MINIMUM_ONNXRUNTIME
    names = [entry.split()[0] for entry in found.distributions]
    install = 'pip install --upgrade "accelrt[cpu]"' if found.version is not None else 'pip install "accelrt[cpu]"'
    if names not in ([], ["onnxruntime"]):  # another flavour, or several: they share one folder
        install = f'pip uninstall -y {" ".join(names)} && pip install "accelrt[cpu]"'
    if usable and found.problem is None:
        return EngineStatus("ort-cpu", True, f"onnxruntime {found.version}, ragged attention proven", None)
    if names == ["onnxruntime-gpu"] and CUDA_PROVIDER in found.providers:  # swapping it would cost the faster engine
        return EngineStatus("ort-cpu", usable, f"{found.problem}; this one is for ort-cuda", None)
    return EngineStatus("ort-cpu", usable, found.problem or "", install)


def _cuda_engine(gpus: tuple[Gpu, ...], hidden: str | None) -> EngineStatus:
    """What can be said without importing PyTorch; loading proves that it sees the GPU."""
    missing = [name for name in ("torch", "triton", "onnx_ir") if importlib.util.find_spec(name) is None]
    if hidden is not None or not gpus:
        return EngineStatus("cuda", False, hidden or "no NVIDIA GPU or driver", None)
    if missing:  # named one by one: the extra would bring onnxruntime-gpu beside onnxruntime
        install = f"pip install {' '.join(missing).replace('_', '-')}"
        return EngineStatus("cuda", False, f"{' and '.join(missing)} missing", install)
    return EngineStatus("cuda", True, f"triton {version_of('triton')} on PyTorch", None)


def _onnxruntime_cuda_engine(found: OnnxRuntime, gpus: tuple[Gpu, ...], hidden: str | None) -> EngineStatus:
    """What can be said without opening a session; a session proves that CUDA's libraries load."""
    if hidden is not None or not gpus:  # first: no package would help
        return EngineStatus("ort-cuda", False, hidden or "no NVIDIA GPU or driver", None)
    names = [entry.split()[0] for entry in found.distributions]
    has_cuda = CUDA_PROVIDER in found.providers
    old = found.version is not None and _release(found.version) < MINIMUM_ONNXRUNTIME_GPU
    swap = f"pip uninstall -y {' '.join(names)} && " if names else ""
    install = f'{swap}pip install "accelrt[cuda]"'
    if "onnxruntime-gpu" not in names:
        there = f"; {' and '.join(found.distributions)} has no CUDA" if names else ""
        return EngineStatus("ort-cuda", False, f"onnxruntime-gpu is not installed{there}", install)
    if not has_cuda or found.version is None:
        shadow = f": {found.problem}" if found.problem else ""
        why = f"the onnxruntime that Python imports has no CUDA provider{shadow}"
        return EngineStatus("ort-cuda", False, why, install)
    if old:
        why = f"onnxruntime-gpu {found.version} is too old: 1.31 or newer is needed"
        return EngineStatus("ort-cuda", False, why, 'pip install --upgrade "accelrt[cuda]"')
    return EngineStatus("ort-cuda", True, f"onnxruntime-gpu {found.version} with its CUDA provider", None)


def _install_tensorrt(name: str, gpus: tuple[Gpu, ...]) -> str:
    """All are on PyPI; full TensorRT's libraries are fetched from pypi.nvidia.com. ``tensorrt`` means CUDA 13."""
    old = any((_release(gpu.driver)[:1] or CUDA_13_DRIVER) < CUDA_13_DRIVER for gpu in gpus)
    package = {"tensorrt": "tensorrt-cu12" if old else "tensorrt", "rtx": f"tensorrt-rtx-cu{12 if old else 13}"}[name]
    least = {"tensorrt": "10.15.1", "rtx": "1.7"}[name]
    return f'pip install "{package}>={least}" "cuda-python>=12.8{",<13" if old else ""}"'


def _tensorrt_engines(gpus: tuple[Gpu, ...], hidden: str | None) -> tuple[EngineStatus, EngineStatus]:
    """What can be said without importing them: loading an engine proves the rest."""
    rows, has_gpu = [], bool(gpus)
    for name, packages in (
        ("tensorrt", ("tensorrt", "tensorrt-cu13", "tensorrt-cu12")),
        ("rtx", ("tensorrt-rtx-cu13", "tensorrt-rtx-cu12", "tensorrt-rtx")),
    ):
        found = next((f"{package} {version}" for package in packages if (version := version_of(package))), None)
        runs = has_gpu and hidden is None and found is not None and version_of("cuda-python") is not None
        if found is None:
            reason = f"{packages[0]} is not installed"
        elif hidden is not None:
            reason = f"{found}, but {hidden}"
        elif not has_gpu:
            builds = "; engines can be built here: accel build --target rtx" if name == "rtx" else ""
            reason = f"{found}, but no NVIDIA GPU or driver{builds}"
        else:
            reason = f"{found}; engines come from the store (accel build)" if runs else "cuda-python is not installed"
        wanted = not runs and (has_gpu or (name == "rtx" and found is None))
        install: str | None = _install_tensorrt(name, gpus)
        if found is not None:
            install = 'pip install "cuda-python>=12.8"' if version_of("cuda-python") is None else None
        rows.append(EngineStatus(name, runs, reason, install if wanted else None))
    return rows[0], rows[1]


def _openvino_engine() -> EngineStatus:
    """What can be said without importing it."""
    version = version_of("openvino")
    if version is None:
        return EngineStatus("openvino", False, "openvino is not installed", 'pip install "accelrt[openvino]"')
    if _release(version) < MINIMUM_OPENVINO:
        why = f"openvino {version} is too old: {'.'.join(map(str, MINIMUM_OPENVINO))} or newer is needed"
        return EngineStatus("openvino", False, why, 'pip install --upgrade "accelrt[openvino]"')
    runs = "encoders in fp32 and bf16 (accel quantize --target openvino)"
    return EngineStatus("openvino", True, f"openvino {version}; {runs}", None)


def _torch_engine() -> EngineStatus:
    missing = [name for name in ("torch", "transformers") if importlib.util.find_spec(name) is None]
    if missing:
        reason = f"{' and '.join(missing)} not installed"
        return EngineStatus("torch", False, reason, 'pip install "accelrt[export]"')
    versions = f"torch {version_of('torch')}, transformers {version_of('transformers')}"
    return EngineStatus("torch", True, f"{versions}; the reference, used as the last fallback", None)


def _packages(gpus: tuple[Gpu, ...]) -> tuple[Package, ...]:
    export, rows, has_gpu = 'pip install "accelrt[export]"', list[Package](), bool(gpus)

    def add(name: str, purpose: str, install: str | None) -> None:
        version = version_of(name)
        rows.append(Package(name, version, purpose, None if version is not None else install))

    for name in ("torch", "transformers", "onnx", "onnx-ir", "onnxscript"):
        add(name, "exporting models", export)
    for name in ("gguf", "accelerate"):
        add(name, "exporting GGUF files", "pip install gguf accelerate")
    swap = "pip uninstall -y onnxruntime && " if version_of("onnxruntime") is not None else ""
    add("onnxruntime-gpu", "engine ort-cuda", f'{swap}pip install "accelrt[cuda]"' if has_gpu else None)
    add("triton", "own GPU kernels", "pip install triton" if has_gpu else None)
    building = "building TensorRT engines (pip must reach pypi.nvidia.com)"
    for name, kinds, purpose in (
        ("tensorrt", ("tensorrt", "tensorrt-cu13", "tensorrt-cu12"), building),
        ("rtx", ("tensorrt-rtx-cu13", "tensorrt-rtx-cu12"), "building TensorRT-RTX engines, also without a GPU"),
    ):
        there = next((kind for kind in kinds if version_of(kind) is not None), kinds[0])
        add(there, purpose, _install_tensorrt(name, gpus) if has_gpu or name == "rtx" else None)
    return tuple(rows)


def as_json(found: Capabilities) -> dict[str, Any]:
    """The probe's result as ``accel doctor --json`` prints it."""
    from accel.schema import to_dict

    result: dict[str, Any] = to_dict(found)
    return result


__all__ = [
    "Capabilities",
    "EngineStatus",
    "OnnxRuntime",
    "Package",
    "as_json",
    "install_export",
    "probe",
    "probe_onnxruntime",
]
