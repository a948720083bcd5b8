"""Which operators the CUDA provider of onnxruntime-gpu 1.31 has kernels for, and in which types.

From ONNX Runtime's list of registered kernels, for opset 23; only operators that lowered graphs may hold. A node
without one runs on the CPU, with copies of its inputs and outputs at every run, and cannot be captured: such a graph
is refused here, where it is made.
"""

from __future__ import annotations

import onnx_ir as ir

from accel.errors import FusionError

FLOAT, FLOAT16, BFLOAT16 = ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.BFLOAT16
_HALVES = frozenset({FLOAT16, BFLOAT16})
_FLOATS = _HALVES | {FLOAT}
_OLD_FLOATS = frozenset({FLOAT, FLOAT16})  # from before bfloat16
_INTS = frozenset({ir.DataType.INT32, ir.DataType.INT64})
_BOOL = frozenset({ir.DataType.BOOL})
_ANY = _FLOATS | _INTS | _BOOL

# Domain and op type -> types of the inputs that it computes with. Indices, lengths, shapes and conditions are left out:
# their places are in SIDE_INPUTS.
KERNELS: dict[tuple[str, str], frozenset[ir.DataType]] = {
    **dict.fromkeys((("", name) for name in ("Add", "Sub", "Mul", "Div", "Abs", "Neg", "Min")), _FLOATS | _INTS),
    **dict.fromkeys(
        (("", name) for name in ("Gather", "GatherElements", "Cast", "Concat", "Expand", "Reshape", "Slice", "Split")),
        _ANY,
    ),
    **dict.fromkeys((("", name) for name in ("Shape", "Squeeze", "Unsqueeze", "Transpose")), _ANY),
    **dict.fromkeys((("", name) for name in ("MatMul", "Gemm", "Gelu", "Relu", "Sigmoid", "Softmax", "Tanh")), _FLOATS),
    **dict.fromkeys((("", name) for name in ("LayerNormalization", "RMSNormalization", "RotaryEmbedding")), _FLOATS),
    **dict.fromkeys((("", name) for name in ("Cos", "Sin", "Log", "ArgMax", "ReduceSum")), _OLD_FLOATS),
    **dict.fromkeys((("", name) for name in ("Less", "LessOrEqual", "Greater", "GreaterOrEqual")), _OLD_FLOATS | _INTS),
    **dict.fromkeys((("", name) for name in ("And", "Or", "Not")), _BOOL),
    ("", "Equal"): _OLD_FLOATS | _INTS | _BOOL,
    ("", "CumSum"): _OLD_FLOATS | _INTS,
    ("", "Range"): _INTS | {FLOAT},
    ("", "Where"): _FLOATS | _INTS,
    **dict.fromkeys(
        (("com.microsoft", name) for name in ("FusedMatMul", "BiasGelu", "FastGelu", "QuickGelu")),
        _FLOATS,
    ),
    ("com.microsoft", "SkipLayerNormalization"): _FLOATS,
    ("com.microsoft", "SkipSimplifiedLayerNormalization"): _FLOATS,
    ("com.microsoft", "MultiHeadAttention"): _FLOATS,
    ("com.microsoft", "GroupQueryAttention"): _HALVES,
    ("com.microsoft", "MatMulNBits"): _FLOATS,
    ("com.microsoft", "GatherBlockQuantized"): _FLOATS,
}
SIDE_INPUTS: dict[tuple[str, str], frozenset[int]] = {
    ("", "Gather"): frozenset({1}),
    ("", "GatherElements"): frozenset({1}),
    ("", "Expand"): frozenset({1}),
    ("", "Reshape"): frozenset({1}),
    ("", "Slice"): frozenset({1, 2, 3, 4}),
    ("", "Split"): frozenset({1}),
    ("", "ReduceSum"): frozenset({1}),
    ("", "Squeeze"): frozenset({1}),
    ("", "Unsqueeze"): frozenset({1}),
    ("", "CumSum"): frozenset({1}),
    ("", "Where"): frozenset({0}),
    ("", "RotaryEmbedding"): frozenset({3}),
    ("com.microsoft", "MultiHeadAttention"): frozenset({4}),
    ("com.microsoft", "GroupQueryAttention"): frozenset({5, 6}),
    ("com.microsoft", "MatMulNBits"): frozenset({1}),
    ("com.microsoft", "GatherBlockQuantized"): frozenset({0, 1}),
}
# May differ in type from input to input, or from input to output; all others have one type.
_MIXED = frozenset({("", "Cast"), ("", "Shape"), ("", "RMSNormalization"), ("", "LayerNormalization")})


def check_kernels(model: ir.Model) -> None:
    """Checks that every node has a CUDA kernel for its types.

    Raises:
        FusionError: One has none; names it and its types.
    """
    for node in model.graph:
        key = (node.domain, node.op_type)
        side = SIDE_INPUTS.get(key, frozenset())
        types = {value.dtype for index, value in enumerate(node.inputs) if value is not None and index not in side}
        missing = key not in KERNELS or not types <= KERNELS[key] or (len(types) > 1 and key not in _MIXED)
        if missing:
            shown = ", ".join(sorted("?" if dtype is None else dtype.name.lower() for dtype in types))
            name = f"{node.domain}::{node.op_type}" if node.domain else node.op_type
            raise FusionError(
                f"onnxruntime-gpu has no CUDA kernel for {name} of {shown}", where=f"{node.name}, ort-cuda"
            )


__all__ = ["KERNELS", "SIDE_INPUTS", "check_kernels"]
