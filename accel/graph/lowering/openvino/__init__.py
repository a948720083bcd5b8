"""Canonical graph of an encoder -> plain standard operators that OpenVINO fuses; it knows no model-local functions."""

from accel.graph.lowering.openvino.lower import VERSION, lower

__all__ = ["VERSION", "lower"]
