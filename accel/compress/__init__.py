"""Quantisation of canonical graphs, independent of targets: which integers stand for which weights.

Why not a library: nvidia-modelopt, neural-compressor and torchao quantise PyTorch modules (the ONNX paths of the first
two insert Q/DQ pairs by matching ``MatMul`` and ``Conv``), and onnxruntime.quantization rewrites ``MatMul`` and
``Gather`` nodes of a finished ONNX file, one operator type after the other. None of them reads a graph whose linears
and attention are private operators, stores a tied table and head once, gives the integers and scales of a layer
without a runtime's own layout around them, or propagates calibration data through the layers quantised before. The
algorithms themselves are short, so they are written here on arrays, from their papers.
"""
