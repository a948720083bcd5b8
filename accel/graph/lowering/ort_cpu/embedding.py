"""The embedding table leaves the graph: its rows become an input, read from the weight file by the session.

A mapped table grows into the process's memory with every new token, by up to a large folio of the page cache (2 MB on
Linux 6.18) per row; reading a row takes 2 microseconds.
"""

from __future__ import annotations

from collections.abc import Container

import onnx_ir as ir

from accel.spec import EMBEDDING, EMBEDDING_INPUT


def take_out_embedding(model: ir.Model, parameters: Container[str]) -> int:
    """Replaces ``Gather(table, input_ids)`` by the input ``token_embeddings`` float32 [T, H], in place.

    Applies to a decoder whose ``input_ids`` have no other reader and whose table is one of ``parameters``, which
    then stands in the model's metadata. Returns 1 if it applied.
    """
    graph = model.graph
    ids = next((value for value in graph.inputs if value.name == "input_ids"), None)
    uses = [] if ids is None else list(ids.uses())
    if ids is None or len(uses) != 1:
        return 0
    node = uses[0].node
    table, output = node.inputs[0], node.outputs[0]
    if node.op_type != "Gather" or node.attributes.get_int("axis", 0) != 0 or node.inputs[1] is not ids:
        return 0
    whole = table is not None and table.is_initializer() and table.name in parameters
    if not whole or output.dtype != ir.DataType.FLOAT or output.shape is None or len(output.shape) != 2:
        return 0
    assert table is not None and table.name is not None
    rows = ir.Value(name=EMBEDDING_INPUT, type=output.type, shape=output.shape)
    ir.convenience.replace_all_uses_with(output, rows)
    graph.remove(node, safe=True)
    graph.inputs[graph.inputs.index(ids)] = rows
    model.metadata_props[EMBEDDING] = table.name
    return 1
