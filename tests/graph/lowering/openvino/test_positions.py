from __future__ import annotations

import dataclasses

import numpy as np
import onnx_ir as ir
import pytest

from accel.errors import FusionError
from accel.graph.lowering.openvino import lower
from accel.graph.lowering.openvino.positions import tabulate_positions, unsafe
from tests.graph.lowering.ort_cpu.test_encoder_attention import ARCH
from tests.graph.small import apply, count, make, run

LIMIT = 600
BUCKETS = """main (int64[B,S] input_ids, int64 zero, int64 one, int64[1] axis, float eight, float log, float[600] table)
    => (float[S,S] y)
    <int64[1] shape, int64 length, int64[S] at, int64[S,1] column, int64[S,S] distance, float[S,S] f, float[S,S] d,
     float[S,S] l, float[S,S] p, float[S,S] q, int64[S,S] bucket> {
  shape = Shape <start = 1, end = 2> (input_ids)
  length = Squeeze (shape, axis)
  at = Range (zero, length, one)
  column = Unsqueeze (at, one)
  distance = Sub (column, at)
  absolute = Abs (distance)
  more = Add (absolute, one)
  f = Cast <to = 1> (more)
  d = Div (f, eight)
  l = Log (d)
  p = Div (l, log)
  q = Mul (p, eight)
  bucket = Cast <to = 7> (q)
  far = Add (bucket, offset)
  y = Gather (table, far)
}"""
CONSTANTS = {
    "zero": np.array(0), "one": np.array(1), "axis": np.array([0]), "eight": np.float32(8), "log": np.float32(0.4),
    "offset": np.array(50), "table": np.arange(600, dtype=np.float32),
}  # fmt: skip


@pytest.mark.parametrize("length", [1, 7, 300])
def test_buckets_become_a_table(length: int) -> None:
    model = make(BUCKETS, **CONSTANTS)
    ids = np.zeros((2, length), np.int64)
    assert len(np.unique(run(model, input_ids=ids)[0])) >= min(length, 30), "the function is no constant"
    assert unsafe(model)
    assert apply(lambda model: tabulate_positions(model, LIMIT), model, input_ids=ids) == 1
    assert count(model, "Log") == 0 and not unsafe(model)
    table = model.graph.initializers["positions_0"].const_value.numpy()  # type: ignore[union-attr]
    assert table.shape == (2 * LIMIT + 1,) and table.dtype == np.int64


OTHERS = {
    "of token ids": [
        ("shape = Shape <start = 1, end = 2> (input_ids)", ""),
        ("Squeeze (shape, axis)", "ReduceMax <keepdims = 0> (input_ids)"),
    ],
    "beside token ids": [
        ("f = Cast", "seen = Cast <to = 1> (input_ids)\n  most = ReduceMax <keepdims = 0> (seen)\n  f = Cast"),
        ("d = Div (f, eight)", "w = Mul (f, most)\n  d = Div (w, eight)"),
    ],
    "of two positions": [
        ("d = Div (f, eight)", "other = Cast <to = 1> (at)\n  sum = Add (f, other)\n  d = Div (sum, eight)"),
    ],
    "not element by element": [("d = Div (f, eight)", "total = ReduceSum <keepdims = 1> (f)\n  d = Div (f, total)")],
}


@pytest.mark.parametrize("change", OTHERS.values(), ids=OTHERS.keys())
def test_other_integers_of_floats_stay(change: list[tuple[str, str]]) -> None:
    text = BUCKETS
    for old, new in change:
        assert old in text
        text = text.replace(old, new)
    model = make(text, **CONSTANTS)
    ids = np.full((2, 5), 5)
    assert apply(lambda model: tabulate_positions(model, LIMIT), model, input_ids=ids) == 0
    assert unsafe(model) and count(model, "Log") == 1
    bare = dataclasses.replace(ARCH, layers=())
    masked = model.clone()
    masked.graph.inputs.append(mask := ir.Value(name="attention_mask", type=ir.TensorType(ir.DataType.INT64)))
    mask.shape = ir.Shape(["B", "S"])
    lower(masked, bare, LIMIT)
    with pytest.raises(FusionError, match="round floats that integers are made of to bfloat16"):
        lower(masked, bare, LIMIT, ir.DataType.BFLOAT16)
