"""Metadata of the distribution ``accelrt``. The layout of kernels/ and export_configs/ needs package_dir."""

from __future__ import annotations

import re
import sys
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent
sys.path.insert(0, str(ROOT / "_build"))
from native import BuildLibrary, PlatformWheel, extension  # noqa: E402

VERSION = re.search(r'^__version__ = "(.+)"', (ROOT / "accel" / "__init__.py").read_text(), re.MULTILINE)
assert VERSION is not None
README = ROOT / "README.md"

CUDA = "cuda-python>=12.8"
RTX = ["tensorrt-rtx-cu13>=1.7", CUDA]
CPU = ["onnxruntime>=1.32"]  # 1.32 brought query_seqlens
EXPORT = ["torch>=2.11", "transformers>=5.17", "onnx>=1.21", "onnx-ir>=1.0", "onnxscript>=0.7.2", *CPU]
OPENVINO = ["openvino>=2025.4"]  # older ones were not tried
STORE = ["fsspec", "cryptography>=42"]  # engines in object stores, and ed25519 signatures; a local folder needs neither
S3 = ["s3fs>=2024.10", *STORE]  # the first with writes that fail if the object is there
# gguf and accelerate: reading GGUF; moto: a real S3 API on loopback; TensorRT-RTX builds engines without a GPU;
# setuptools: how the library of CPU operators is built.
LINUX_RTX = [f"{package}; sys_platform == 'linux'" for package in RTX]
TEST = [
    "pytest",
    "pytest-xdist",
    "psutil",
    "matplotlib",
    "gguf",
    "accelerate",
    "moto[server]",
    "setuptools>=77",
    *S3,
    *EXPORT,
    *LINUX_RTX,
    *OPENVINO,
    "triton>=3.6; sys_platform == 'linux'",  # kernels run on its interpreter
]
EXTRAS = {
    "cpu": CPU,
    "openvino": OPENVINO,
    "export": EXPORT,
    # onnxruntime and onnxruntime-gpu share one folder: never install cpu (or export) and cuda together.
    "cuda": ["onnxruntime-gpu>=1.31", "triton>=3.6", "torch>=2.11", "onnx-ir>=1.0"],
    "tensorrt": ["tensorrt>=10.15.1", CUDA],
    "rtx": RTX,
    "store": STORE,
    "s3": S3,
    "serve": ["fastapi", "uvicorn"],
    # What runs beside this distribution; scripts/peers.sh builds the environments of those that exclude one another.
    "peers": ["matplotlib", "psutil", "ctranslate2", "onnxruntime-genai", "sentence-transformers"],
    "test": TEST,
    "dev": ["ruff", "mypy", *TEST],
}

setup(
    name="accelrt",
    version=VERSION[1],
    description="Exports transformer models and runs them fast on whatever hardware they meet",
    long_description=README.read_text(encoding="utf-8") if README.exists() else "",
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE"],
    python_requires=">=3.11",
    packages=[
        *find_packages(include=["accel", "accel.*"]),
        *("accel.export_configs", "accel_kernels", "accel_kernels.benchmark", "accel_cpu"),
    ],
    package_dir={
        "accel_kernels": "kernels/accel_kernels",
        "accel_cpu": "kernels/accel_cpu",
        "accel.export_configs": "export_configs",
    },
    package_data={
        "accel": ["py.typed"],
        "accel_cpu": ["py.typed"],
        "accel.export_configs": ["*.yaml"],
    },
    ext_modules=[extension("kernels/accel_cpu")],
    cmdclass={"build_ext": BuildLibrary, "bdist_wheel": PlatformWheel},
    install_requires=["numpy", "tokenizers", "jinja2", "PyYAML", "filelock", "rich"],
    extras_require=EXTRAS,
    entry_points={"console_scripts": ["accel = accel.cli:main"]},
    classifiers=[
        "Development Status :: 3 - Alpha",
        "Intended Audience :: Developers",
        "Operating System :: POSIX",
        "Programming Language :: Python :: 3",
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Programming Language :: Python :: 3.13",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
        "Typing :: Typed",
    ],
)
