from __future__ import annotations

import numpy as np
import pytest

from accel.graph.lowering.ort_cpu.embedding import take_out_embedding
from accel.spec import EMBEDDING, EMBEDDING_INPUT
from tests.graph.small import assert_close, make, normal, ops, run

TABLE = normal(7, 4)
TEXT = """main (int64[T] input_ids, float[4] b, float[7,4] table) => (float[T,4] y%s) {
  x = Gather <axis = %d> (table, input_ids)
  y = Add (x, b)
  %s
}"""


def test_the_rows_become_an_input() -> None:
    model = make(TEXT % ("", 0, ""), table=TABLE)
    ids, b = np.array([6, 0, 3]), normal(4)
    before = run(model, input_ids=ids, b=b)
    assert take_out_embedding(model, {"table"}) == 1
    assert ops(model) == ["Add"] and model.metadata_props[EMBEDDING] == "table"
    assert [value.name for value in model.graph.inputs] == [EMBEDDING_INPUT, "b"]
    del model.graph.initializers["table"]
    assert_close(run(model, **{EMBEDDING_INPUT: TABLE[ids]}, b=b), before)


@pytest.mark.parametrize(
    "model,parameters",
    [
        (make(TEXT % ("", 0, ""), table=TABLE), set()),
        (make(TEXT % (", int64[T] z", 0, "z = Identity (input_ids)"), table=TABLE), {"table"}),
        (make(TEXT % ("", 0, "")), {"table"}),
        (make(TEXT % ("", 0, ""), table=TABLE.astype(np.float64), b=normal(4).astype(np.float64)), {"table"}),
    ],
    ids=["no parameter", "ids read elsewhere", "a table that is an input", "not float32"],
)
def test_stays_inside(model, parameters) -> None:  # type: ignore[no-untyped-def]
    before = ops(model)
    assert take_out_embedding(model, parameters) == 0
    assert ops(model) == before and EMBEDDING not in model.metadata_props
