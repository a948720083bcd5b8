"""Builds TensorRT engines from a bundle's lowered graphs: parse, repair, prove, build."""
