"""Finds ``tensorrt`` or ``tensorrt_rtx`` on this machine, or says what to install."""

from __future__ import annotations

import importlib
from importlib import metadata
from importlib.util import find_spec
from types import ModuleType
from typing import Any

from accel.errors import DependencyError

MODULES = {"tensorrt": "tensorrt", "rtx": "tensorrt_rtx"}
TITLES = {"tensorrt": "TensorRT", "rtx": "TensorRT-RTX"}
MINIMUM = {"tensorrt": (10, 15, 1), "rtx": (1, 7)}  # 10.14.1 brought attention, 10.15.1 rotary and KV cache layers
_REQUIREMENT = {"tensorrt": "tensorrt>=10.15.1", "rtx": "tensorrt-rtx-cu13>=1.7"}
_DISTRIBUTIONS = {
    "tensorrt": ("tensorrt", "tensorrt-cu13", "tensorrt-cu12"),
    "rtx": ("tensorrt-rtx-cu13", "tensorrt-rtx-cu12", "tensorrt-rtx"),
}


def is_installed(target: str) -> bool:
    """Whether the package of a target is there; it may be broken. Imports nothing."""
    try:
        return find_spec(MODULES[target]) is not None
    except ValueError:  # imported, by something without a spec
        return True


def import_package(target: str) -> tuple[Any, str]:
    """Imports the package of a target (``tensorrt`` or ``rtx``).

    Returns:
        The module and its full version.

    Raises:
        DependencyError: It is missing, too old, or cannot be imported; carries the pip command.
    """
    trt = _import(target)
    version = str(trt.__version__)
    if release_of(version) < MINIMUM[target]:
        least = ".".join(map(str, MINIMUM[target]))
        what = f"{TITLES[target]} {version} is too old: {least} or newer is needed"
        remedy = f'Run: pip install --upgrade "{_requirement(target)}"'
        raise DependencyError(what, where=MODULES[target], remedy=remedy)
    return trt, version


def _import(target: str) -> ModuleType:
    name = MODULES[target]
    try:
        trt = importlib.import_module(name)
        trt.__version__, trt.Builder, trt.OnnxParser  # noqa: B018 (what uninstalling half of it leaves has none)
        return trt
    except ModuleNotFoundError as error:
        if error.name == name:
            remedy = f'Run: pip install "{_REQUIREMENT[target]}"'
            raise DependencyError(f"{TITLES[target]} is not installed", where=name, remedy=remedy) from error
        problem: Exception = error
    except (ImportError, AttributeError, OSError, RuntimeError) as error:  # a library is missing, or of another version
        problem = error
    remedy = f'Run: pip install --force-reinstall --no-cache-dir "{_requirement(target)}"'
    what = f"{TITLES[target]} is installed but cannot be imported: {problem}"
    raise DependencyError(what, where=name, remedy=remedy) from problem


def _requirement(target: str) -> str:
    """What to install, keeping the CUDA version of the distribution that is there."""
    for name in _DISTRIBUTIONS[target]:
        try:
            metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
        return f"{name}>={_REQUIREMENT[target].partition('>=')[2]}"
    return _REQUIREMENT[target]


def release_of(version: str) -> tuple[int, ...]:
    """The first three numbers of a version."""
    return tuple(int(part) for part in version.split(".")[:3] if part.isdigit())


def current_sm() -> str | None:
    """SM of the current CUDA device, e.g. ``sm89``; None without a GPU, a driver, or the package cuda-python."""
    try:
        from cuda.bindings import runtime
    except ImportError:
        return None
    status, device = runtime.cudaGetDevice()
    if status != runtime.cudaError_t.cudaSuccess:
        return None
    attributes = runtime.cudaDeviceAttr
    numbers = []
    for attribute in (attributes.cudaDevAttrComputeCapabilityMajor, attributes.cudaDevAttrComputeCapabilityMinor):
        status, value = runtime.cudaDeviceGetAttribute(attribute, device)
        if status != runtime.cudaError_t.cudaSuccess:
            return None
        numbers.append(value)
    return f"sm{numbers[0]}{numbers[1]}"


def current_gpu() -> str | None:
    """Name of the current CUDA device, e.g. ``NVIDIA L4``; None without a GPU, a driver, or the package cuda-python.

    Not nvidia-smi's first one: CUDA_VISIBLE_DEVICES may name another.
    """
    try:
        from cuda.bindings import runtime
    except ImportError:
        return None
    status, device = runtime.cudaGetDevice()
    if status != runtime.cudaError_t.cudaSuccess:
        return None
    status, properties = runtime.cudaGetDeviceProperties(device)
    return properties.name.decode().rstrip("\0") if status == runtime.cudaError_t.cudaSuccess else None


def cuda_version() -> str | None:
    """Version of the CUDA runtime, e.g. ``13.0``; None without cuda-python."""
    try:
        from cuda.bindings import runtime
    except ImportError:
        return None
    status, version = runtime.cudaRuntimeGetVersion()
    return f"{version // 1000}.{version % 1000 // 10}" if status == runtime.cudaError_t.cudaSuccess else None


__all__ = [
    "MODULES",
    "TITLES",
    "cuda_version",
    "current_gpu",
    "current_sm",
    "import_package",
    "is_installed",
    "release_of",
]
