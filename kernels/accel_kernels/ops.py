"""All fused ops: what tests and benchmarks go over."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class Op:
    """One fused op. Its module is named after its launcher.

    Attributes:
        name: The launcher's name.
        function: The name of its ONNX function in the domain "accel.kernels".
    """

    name: str
    function: str

    @property
    def module(self) -> Any:
        """The module, imported (with Triton) when it is asked for."""
        return importlib.import_module(f"accel_kernels.{self.name}")

    @property
    def launch(self) -> Callable[..., Any]:
        """Launches the kernel; writes into the tensors that it is given."""
        return getattr(self.module, self.name)

    @property
    def reference(self) -> Callable[..., Any]:
        """The same in plain PyTorch and float64; returns the results."""
        return self.module.reference

    @property
    def body(self) -> str:
        """The same as an ONNX function in textual syntax; the functions that it calls are in ``bodies.SHARED``."""
        return self.module.BODY

    @property
    def tolerances(self) -> dict[torch.dtype, float]:
        """Largest error per type of the kernel's tensors, relative to the largest reference value."""
        return self.module.TOLERANCES


OPS = (
    Op("gemv", "Gemv"),
    Op("narrow_gemm", "NarrowGemm"),
    Op("block_gemm", "BlockGemm"),
    Op("wide_gemm", "WideGemm"),
    Op("specialized_gemm", "SpecializedGemm"),
    Op("quantized_gemv", "QuantizedGemv"),
    Op("quantized_gemm", "QuantizedGemm"),
    Op("quantized_gather", "QuantizedGather"),
    Op("norm", "Norm"),
    Op("activation", "Activation"),
    Op("rotary_append", "RotaryAppend"),
    Op("decode_attention", "DecodeAttention"),
    Op("varlen_attention", "VarlenAttention"),
    Op("argmax", "Argmax"),
    Op("sample", "Sample"),
    Op("gather", "Gather"),
)

__all__ = ["OPS", "Op"]
