"""Builds TensorRT engines: profiles, parsing, proof, build."""
