"""The canonical operators, evaluated by PyTorch, beside the definition."""

from __future__ import annotations

import numpy as np

from accel.graph.evaluation.torch_graph import TorchGraph
from tests.graph.attention_reference import CachedReference
from tests.graph.small import assert_close, make, normal

CACHED = """main (float[T,32] q, float[T,16] k, float[T,16] v, float[3,2,12,8] past_key, float[3,2,12,8] past_value,
    int32[3] past, int32[3] fresh) => (float[T,32] y, float[3,2,12,8] key, float[3,2,12,8] value) {
  y, key, value = accel.CachedAttention <num_heads = 4, kv_num_heads = 2, scale = 0.4>
    (q, k, v, past_key, past_value, past, fresh)
}"""


def test_rows_of_a_step_may_bring_no_token() -> None:
    graph = TorchGraph(make(CACHED))
    reference = CachedReference(3, 4, 2, 0.4, None, None)
    keys = values = np.zeros((3, 2, 12, 8), np.float32)
    past = np.zeros(3, np.int32)
    for index, lengths in enumerate([(5, 2, 0), (0, 3, 1), (2, 0, 0)]):  # one is empty altogether at first
        q, k, v = (normal(sum(lengths), width, seed=index) for width in (32, 16, 16))
        feeds = {"q": q, "k": k, "v": v, "past_key": keys, "past_value": values, "past": past}
        found = graph.run({**feeds, "fresh": np.array(lengths, np.int32)})
        keys, values = found["key"], found["value"]
        assert_close([found["y"]], [reference.step(q, k, v, lengths).astype(np.float32)])
        past = past + np.array(lengths, np.int32)
