"""TensorRT and TensorRT-RTX behind one adapter."""
