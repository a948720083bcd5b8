"""TensorRT engines from lowered graphs: parsed, repaired, proved against the graph, built."""
