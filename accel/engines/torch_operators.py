"""ONNX's operators on PyTorch tensors, each in the type that its operands have."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias

import numpy as np
import onnx_ir as ir
import torch
from numpy.typing import NDArray
from torch.nn import functional

Tensor: TypeAlias = torch.Tensor
TYPES = {
    ir.DataType.FLOAT: torch.float32,
    ir.DataType.FLOAT16: torch.float16,
    ir.DataType.BFLOAT16: torch.bfloat16,
    ir.DataType.INT64: torch.int64,
    ir.DataType.INT32: torch.int32,
    ir.DataType.BOOL: torch.bool,
    ir.DataType.DOUBLE: torch.float64,
}

ROUNDED = {ir.DataType.INT8: torch.int8, ir.DataType.FLOAT8E4M3FN: torch.float8_e4m3fn}  # results of QuantizeLinear


def to_torch(array: NDArray) -> Tensor:
    """A tensor of the same bytes (a copy where the array is read-only); int4 becomes int8."""
    if array.dtype.name == "float8_e4m3fn":
        return torch.from_numpy(array.view(np.uint8).copy()).view(torch.float8_e4m3fn)
    if array.dtype.name == "bfloat16":
        return torch.from_numpy(array.view(np.int16).copy()).view(torch.bfloat16)
    if array.dtype.name == "int4":
        array = array.astype(np.int8)
    return torch.from_numpy(np.array(array) if not array.flags.writeable else array)


def to_numpy(tensor: Tensor) -> NDArray:
    """An array of the same bytes."""
    if tensor.dtype == torch.bfloat16:
        return tensor.view(torch.int16).numpy().view(ir.DataType.BFLOAT16.numpy())
    if tensor.dtype == torch.float8_e4m3fn:
        return tensor.view(torch.uint8).numpy().view(ir.DataType.FLOAT8E4M3FN.numpy())
    return tensor.numpy()


def _int(node: ir.Node, name: str, default: int = 0) -> int:
    value = node.attributes.get_int(name, default)
    assert value is not None
    return value


def _axes(axes: Tensor) -> list[int]:
    return [int(axis) for axis in axes.reshape(-1)]


def _reshape(node: ir.Node, x: Tensor, shape: Tensor) -> Tensor:
    sizes = [x.shape[place] if size == 0 else int(size) for place, size in enumerate(shape.tolist())]
    return x.reshape(sizes)


def _unsqueeze(node: ir.Node, x: Tensor, axes: Tensor) -> Tensor:
    rank = x.dim() + axes.numel()
    for axis in sorted(axis % rank for axis in _axes(axes)):
        x = x.unsqueeze(axis)
    return x


def _squeeze(node: ir.Node, x: Tensor, axes: Tensor | None = None) -> Tensor:
    return x.squeeze() if axes is None else x.squeeze(tuple(_axes(axes)))


def _arg_max(node: ir.Node, x: Tensor) -> Tensor:
    return x.argmax(_int(node, "axis"), keepdim=bool(_int(node, "keepdims", 1)))


def _shape(node: ir.Node, x: Tensor) -> Tensor:
    return torch.tensor(list(x.shape)[_int(node, "start") : node.attributes.get_int("end", None)], dtype=torch.int64)


def _gather(node: ir.Node, x: Tensor, index: Tensor) -> Tensor:
    axis = _int(node, "axis") % x.dim()
    taken = x.index_select(axis, _from_front(index, x.shape[axis]).reshape(-1))
    return taken.reshape(*x.shape[:axis], *index.shape, *x.shape[axis + 1 :])


def _gather_elements(node: ir.Node, x: Tensor, index: Tensor) -> Tensor:
    axis = _int(node, "axis")
    return torch.gather(x, axis, _from_front(index, x.shape[axis]))


def _from_front(index: Tensor, size: int) -> Tensor:
    return torch.where(index < 0, index + size, index)


def _slice(
    node: ir.Node, x: Tensor, starts: Tensor, ends: Tensor, axes: Tensor | None = None, *steps: Tensor
) -> Tensor:
    places = range(starts.numel()) if axes is None else _axes(axes)
    strides = _axes(steps[0]) if steps else [1] * starts.numel()
    for axis, start, end, stride in zip(places, _axes(starts), _axes(ends), strides, strict=True):
        window = range(x.shape[axis])[start:end:stride]
        if stride == 1:
            x = x.narrow(axis, window.start, len(window))
        else:
            x = x.index_select(axis, torch.tensor(list(window), dtype=torch.int64, device=x.device))
    return x


def _split(node: ir.Node, x: Tensor, sizes: Tensor | None = None) -> tuple[Tensor, ...]:
    axis = _int(node, "axis")
    if sizes is not None:
        return x.split(_axes(sizes), axis)
    return x.chunk(len(node.outputs), axis)


def _layer_norm(node: ir.Node, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    epsilon = node.attributes.get_float("epsilon", 1e-5)
    return functional.layer_norm(x, weight.shape, weight, bias, epsilon)  # type: ignore[arg-type]


def _rms_norm(node: ir.Node, x: Tensor, weight: Tensor) -> Tensor:
    epsilon = node.attributes.get_float("epsilon", 1e-5)
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + epsilon) * weight


def _gelu(node: ir.Node, x: Tensor) -> Tensor:
    return functional.gelu(x, approximate=node.attributes.get_string("approximate", "none"))  # type: ignore[arg-type]


def _gemm(node: ir.Node, a: Tensor, b: Tensor, c: Tensor | None = None) -> Tensor:
    product = a @ (b.T if _int(node, "transB") else b)
    return product if c is None else product + c


def _softmax(node: ir.Node, x: Tensor) -> Tensor:
    return torch.softmax(x, _int(node, "axis", -1))


def _rotary(node: ir.Node, x: Tensor, cos: Tensor, sin: Tensor, positions: Tensor | None = None) -> Tensor:
    """x [B, H, S, D], or [B, S, H * D] with ``num_heads``; tables [P, R / 2], or [B, S, R / 2] without positions."""
    heads = _int(node, "num_heads")
    flat = x.dim() == 3
    if flat:
        x = x.reshape(*x.shape[:2], heads, -1).transpose(1, 2)
    if positions is not None:
        cos, sin = cos[positions], sin[positions]
    cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
    part = 2 * cos.shape[-1]
    turned, rest = x[..., :part], x[..., part:]
    if _int(node, "interleaved"):
        first, second = turned[..., 0::2], turned[..., 1::2]
        pairs = [first * cos - second * sin, first * sin + second * cos]
        turned = torch.stack(pairs, -1).flatten(-2)
    else:
        first, second = turned.chunk(2, -1)
        turned = torch.cat([first * cos - second * sin, first * sin + second * cos], -1)
    result = torch.cat([turned, rest], -1)
    return result.transpose(1, 2).flatten(2) if flat else result


def _tensor_scatter(node: ir.Node, past: Tensor, update: Tensor, index: Tensor) -> Tensor:
    """Row b's update goes to slots index[b] .. of axis 2."""
    result = past.clone()
    for row, start in enumerate(index.tolist()):
        result[row, :, start : start + update.shape[2]] = update[row]
    return result


def _attention(node: ir.Node, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None) -> Tensor:
    """[B, H, S, D]; scores and softmax in float32, as fused kernels keep them."""
    scale = node.attributes.get_float("scale", None)
    groups = query.shape[1] // key.shape[1]
    key, value = (item.repeat_interleave(groups, 1) if groups > 1 else item for item in (key, value))
    scores = query.float() @ key.float().transpose(-1, -2) * (query.shape[-1] ** -0.5 if scale is None else scale)
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else scores + mask.float()
    return torch.softmax(scores, -1).to(value.dtype) @ value


def _spread(node: ir.Node, scale: Tensor, shape: torch.Size) -> Tensor:
    """A scale of all, of each place of ``axis``, or of each block along it, so that it fits a tensor of this shape."""
    axis, block = _int(node, "axis", 1), _int(node, "block_size")
    if block:
        return scale.float().repeat_interleave(block, axis % len(shape)).narrow(axis % len(shape), 0, shape[axis])
    if scale.dim() == 0 or scale.numel() == 1:
        return scale.float().reshape(())
    return scale.float().reshape([-1 if place == axis % len(shape) else 1 for place in range(len(shape))])


def _quantize(node: ir.Node, x: Tensor, scale: Tensor) -> Tensor:
    """To INT8 or FLOAT8E4M3FN, nearest even, beyond the range its end."""
    dtype = ROUNDED[ir.DataType(_int(node, "output_dtype"))]
    scaled = x.float() / _spread(node, scale, x.shape)
    if dtype == torch.int8:
        return scaled.round().clamp(-128, 127).to(dtype)
    largest = torch.finfo(dtype).max
    return scaled.clamp(-largest, largest).to(dtype)


def _dequantize(node: ir.Node, x: Tensor, scale: Tensor) -> Tensor:
    return (x.float() * _spread(node, scale, x.shape)).to(scale.dtype)


def _reduce(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def apply(node: ir.Node, x: Tensor, axes: Tensor | None = None) -> Tensor:
        places = list(range(x.dim())) if axes is None else _axes(axes)
        return function(x, places, keepdim=bool(_int(node, "keepdims", 1)))

    return apply


def _cumsum(node: ir.Node, x: Tensor, axis: Tensor) -> Tensor:
    return torch.cumsum(x, int(axis))


def _expand(node: ir.Node, x: Tensor, shape: Tensor) -> Tensor:
    return x.expand(torch.broadcast_shapes(x.shape, _axes(shape)))


def _plain(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    return lambda node, *inputs: function(*inputs)


OPERATORS: dict[str, Callable[..., Any]] = {
    **{name: _plain(getattr(torch, name.lower())) for name in ("Add", "Sub", "Mul", "Neg", "Abs", "Sigmoid", "Tanh")},
    **{name: _plain(getattr(torch, name.lower())) for name in ("Relu", "Sqrt", "Exp", "Log", "Cos", "Sin", "Erf")},
    **{name: _plain(getattr(torch, name.lower())) for name in ("Pow", "MatMul", "Where", "Reciprocal", "Round")},
    "Div": lambda node, a, b: torch.div(a, b, rounding_mode=None if a.is_floating_point() else "trunc"),
    "And": _plain(torch.logical_and),
    "Or": _plain(torch.logical_or),
    "Not": _plain(torch.logical_not),
    "Equal": _plain(torch.eq),
    "Greater": _plain(torch.gt),
    "GreaterOrEqual": _plain(torch.ge),
    "Less": _plain(torch.lt),
    "LessOrEqual": _plain(torch.le),
    "Min": _plain(torch.minimum),
    "Max": _plain(torch.maximum),
    "Identity": lambda node, x: x,
    "Cast": lambda node, x: x.to(TYPES[ir.DataType(_int(node, "to"))]),
    "Concat": lambda node, *parts: torch.cat(parts, _int(node, "axis")),
    "Range": lambda node, start, stop, step: torch.arange(start.item(), stop.item(), step.item(), dtype=start.dtype),
    "Transpose": lambda node, x: x.permute(list(node.attributes.get_ints("perm", ()) or range(x.dim())[::-1])),
    "Reshape": _reshape,
    "Unsqueeze": _unsqueeze,
    "Squeeze": _squeeze,
    "Shape": _shape,
    "Gather": _gather,
    "GatherElements": _gather_elements,
    "Slice": _slice,
    "Split": _split,
    "Expand": _expand,
    "CumSum": _cumsum,
    "ArgMax": _arg_max,
    "ReduceMean": _reduce(torch.mean),
    "ReduceSum": _reduce(torch.sum),
    "LayerNormalization": _layer_norm,
    "RMSNormalization": _rms_norm,
    "Softmax": _softmax,
    "Gelu": _gelu,
    "Gemm": _gemm,
    "QuantizeLinear": _quantize,
    "DequantizeLinear": _dequantize,
    "RotaryEmbedding": _rotary,
    "TensorScatter": _tensor_scatter,
    "Attention": _attention,
}
# Attributes that are not looked at, with the only value at which that is right.
FIXED: dict[str, dict[str, Any]] = {
    "Attention": {"is_causal": 0, "softcap": 0.0, "qk_matmul_output_mode": 0},
    "ArgMax": {"select_last_index": 0},
    "CumSum": {"exclusive": 0, "reverse": 0},
    "Gemm": {"alpha": 1.0, "beta": 1.0, "transA": 0},
    "LayerNormalization": {"axis": -1},
    "RMSNormalization": {"axis": -1},
    "QuantizeLinear": {"saturate": 1, "precision": 0},
    "DequantizeLinear": {"output_dtype": 0},
    "Reshape": {"allowzero": 0},
    "TensorScatter": {"axis": -2, "mode": "linear"},
}


__all__ = ["FIXED", "OPERATORS", "TYPES", "Tensor", "to_numpy", "to_torch"]
