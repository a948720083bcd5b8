"""Sessions of one operator, and what it must compute, in numpy."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import accel_cpu
import numpy as np
import onnx
import onnxruntime
from numpy.typing import NDArray
from onnx import TensorProto, helper

SMALLEST = 1e-30  # magnitudes below it count as zero
ACTIVATIONS: dict[str, Callable[[NDArray], NDArray]] = {
    "": lambda x: x,
    "gelu": lambda x: 0.5 * x * (1 + np.vectorize(math.erf)(x / math.sqrt(2))),
    "gelu_tanh": lambda x: 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))),
    "silu": lambda x: x / (1 + np.exp(-x)),
}


@dataclass(frozen=True)
class Product:
    """A quantised weight and what follows its product.

    Attributes:
        values: int8 [N, K]; gated: of the gate.
        scales: float32 [N, G].
        up: values and scales of the up projection, if the product is gated.
        up_bias: Its bias.
    """

    values: NDArray[np.int8]
    scales: NDArray[np.float32]
    bits: int
    block: int
    bias: NDArray[np.float32] | None = None
    activation: str = ""
    up: tuple[NDArray[np.int8], NDArray[np.float32]] | None = None
    up_bias: NDArray[np.float32] | None = None
    optional: tuple[str, ...] = field(default=())  # graph inputs beside x: x_scale, residual

    @property
    def inputs(self) -> int:
        return self.values.shape[1]

    @property
    def outputs(self) -> int:
        return self.values.shape[0]

    def packed(self) -> dict[str, NDArray]:
        """Initializers of the node."""
        values, scales, bias = self.values, self.scales, self.bias
        if self.up is not None:
            values = accel_cpu.interleave_gated(values, self.up[0])
            scales = accel_cpu.interleave_gated(scales, self.up[1])
            if bias is not None and self.up_bias is not None:
                bias = accel_cpu.interleave_gated(bias, self.up_bias)
        tensors: dict[str, NDArray] = {
            "weight": accel_cpu.pack(values, self.bits),
            "scales": accel_cpu.pack_scales(scales, self.block),
        }
        return tensors if bias is None else tensors | {"bias": bias}

    def expect(self, x: NDArray, x_scale: float | None = None, residual: NDArray | None = None) -> NDArray[np.float64]:
        """float64 [..., N]: exact sums of integers, scaled in float64."""
        rows = x.reshape(-1, self.inputs)
        result = _product(rows, self.values, self.scales, self.block, x_scale)
        if self.bias is not None:
            result = result + self.bias
        result = ACTIVATIONS[self.activation](result)
        if self.up is not None:
            up = _product(rows, *self.up, self.block, x_scale)
            result = result * (up if self.up_bias is None else up + self.up_bias)
        result = result.reshape(*x.shape[:-1], self.outputs)
        return result if residual is None else result + residual


def random_product(outputs: int, inputs: int, bits: int, block: int, seed: int = 0, **more: Any) -> Product:
    """A product with random values and scales that keep the results near 1."""
    rng = np.random.default_rng(seed)
    size = 1.0 / ((64 if bits == 8 else 5) * math.sqrt(inputs))

    def weight() -> tuple[NDArray[np.int8], NDArray[np.float32]]:
        limits = (-127, 128) if bits == 8 else (-8, 8)
        scales = rng.uniform(size / 2, size, (outputs, -(-inputs // block) if block else 1)).astype(np.float32)
        values = rng.integers(*limits, (outputs, inputs), dtype=np.int8)
        return values, scales.astype(np.float16).astype(np.float32) if block else scales

    values, scales = weight()
    product = Product(values, scales, bits, block)
    if more.pop("gated", False):
        product = replace(product, up=weight())
    if more.pop("biased", False):
        bias = rng.standard_normal(outputs).astype(np.float32)
        product = replace(product, bias=bias, up_bias=None if product.up is None else bias[::-1].copy())
    return replace(product, **more)


def quantize(x: NDArray[np.float32], x_scale: float | None = None) -> tuple[NDArray[np.int8], NDArray[np.float32]]:
    """int8 values and float32 scales [..., 1] of blocks that lie along the last axis."""
    largest = np.abs(x).max(axis=-1, keepdims=True)
    if x_scale is None:
        nothing = largest < SMALLEST
        scales = np.where(nothing, np.float32(0), largest / np.float32(127))
        inverse = np.where(nothing, np.float32(0), np.float32(127) / np.where(nothing, np.float32(1), largest))
    else:
        scales = np.full_like(largest, x_scale)
        inverse = np.full_like(largest, np.float32(1) / np.float32(x_scale))
    return np.rint(np.clip(x * inverse, -127, 127)).astype(np.int8), scales


def _product(x: NDArray, values: NDArray, scales: NDArray, block: int, x_scale: float | None) -> NDArray[np.float64]:
    width = block or x.shape[1]
    total = np.zeros((len(x), len(values)))
    for index, first in enumerate(range(0, x.shape[1], width)):
        quantized, row_scales = quantize(x[:, first : first + width], x_scale)
        sums = quantized.astype(np.int64) @ values[:, first : first + width].astype(np.int64).T
        total += sums * row_scales.astype(np.float64) * scales[:, index].astype(np.float64)
    return total


def open_session(
    op: str,
    inputs: dict[str, Any],
    initializers: dict[str, NDArray],
    order: list[str],
    threads: int = 2,
    outputs: tuple[str, ...] = ("y",),
    **attrs: Any,
) -> onnxruntime.InferenceSession:
    """A session of one node of the domain accel.cpu.

    Args:
        inputs: Graph input -> (element type, shape).
        order: The node's inputs; "" where an optional one is absent.
        outputs: Its outputs, all float32.
        attrs: Its attributes.
    """
    node = helper.make_node(op, order, outputs, domain=accel_cpu.DOMAIN, **attrs)
    graph = helper.make_graph(
        [node],
        "one",
        [helper.make_tensor_value_info(name, kind, shape) for name, (kind, shape) in inputs.items()],
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in outputs],
        [onnx.numpy_helper.from_array(value, name) for name, value in initializers.items()],
    )
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid(accel_cpu.DOMAIN, 1)]
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.intra_op_num_threads = threads
    options.register_custom_ops_library(str(accel_cpu.library_path()))
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
    return onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


def open_product(
    product: Product, threads: int = 2, fed: bool = False, **changed: Any
) -> onnxruntime.InferenceSession:
    """A session of a product.

    Args:
        fed: The weight is no initializer: it comes with each run.
        changed: Attributes or initializers in place of the product's own.
    """
    initializers = product.packed()
    order = ["x", "weight", "scales", "bias", "x_scale", "residual"]
    inputs: dict[str, Any] = {"x": (TensorProto.FLOAT, None)}
    inputs |= {name: (TensorProto.FLOAT, [] if name == "x_scale" else None) for name in product.optional}
    attributes: dict[str, Any] = {"N": product.outputs, "K": product.inputs, "bits": product.bits}
    attributes |= {"block_size": product.block, "activation": product.activation, "gated": int(product.up is not None)}
    for name, value in changed.items():
        (initializers if name in initializers else attributes)[name] = value
    if fed:
        inputs |= {name: (helper.np_dtype_to_tensor_dtype(v.dtype), v.shape) for name, v in initializers.items()}
        initializers = {}
    present = [name if name in initializers or name in inputs else "" for name in order]
    return open_session(accel_cpu.MATMUL, inputs, initializers, present, threads, **attributes)


def run(session: onnxruntime.InferenceSession, **inputs: NDArray | np.generic) -> NDArray[np.float32]:
    """The operator's result."""
    (result,) = session.run(None, {name: np.asarray(value) for name, value in inputs.items()})
    return result


def assert_close(actual: NDArray, expected: NDArray, tolerance: float = 1e-6) -> None:
    """At most ``tolerance`` of the largest expected value away, and no NaN."""
    assert actual.dtype == np.float32
    assert actual.shape == expected.shape, (actual.shape, expected.shape)
    assert np.isfinite(actual).all()
    if expected.size:
        error = np.abs(actual - expected).max() / max(np.abs(expected).max(), 1e-30)
        assert error <= tolerance, f"error {error:.2e}, tolerance {tolerance:.0e}"
