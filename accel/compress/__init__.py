"""Quantisation of canonical graphs, independent of targets: which integers stand for which weights.

Why not a library: nvidia-modelopt's ONNX tools and onnxruntime.quantization take ``MatMul`` and ``Gather`` nodes of
standard graphs and give Q/DQ pairs or a runtime's own operators with its layout, onnx-neural-compressor (GPTQ, AWQ and
SmoothQuant too, last released in 2024 against ONNX Runtime 1.18) likewise, and torchao changes ``nn.Linear`` modules of
a PyTorch model. None sees products and attention that are private nodes, quantises a tied table and head once, or hands
out a layer's integers and scales for several targets to lay out; neural-compressor's ``gptq(W, H)`` on arrays comes
nearest, as an internal function with other grids and scales. What remains to be taken is short, so the algorithms are
written here from their papers, on arrays.
"""
