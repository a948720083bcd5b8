"""A second variant made by hand: fp32's ort-cpu graph over weights rounded to a grid of few bits."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import numpy_helper

from accel.bundle import Bundle
from accel.bundle_extension import BundleExtension
from accel.manifest import Manifest, Quantization, QuantizedLayer, Variant

INLINE_BYTES = 1024


def round_rows(weight: NDArray[np.float32], bits: int) -> NDArray[np.float32]:
    """Each row on a symmetric grid of its own."""
    top = 2 ** (bits - 1) - 1
    scale = np.abs(weight).max(axis=1, keepdims=True) / top
    scale[scale == 0] = 1
    return (np.rint(weight / scale) * scale).astype(np.float32)


def write_rounded(bundle: Bundle, folder: Path, bits: int, name: str = "rounded") -> Manifest:
    """Writes the variant's graph and weights into ``folder``; returns the bundle's manifest with it."""
    entry = bundle.graph("fp32", "ort-cpu")
    model = onnx.load(str(bundle.file(entry.file)), load_external_data=True)
    layers, before, weights = [], 0, f"{name}.weights"
    for tensor in model.graph.initializer:
        value = numpy_helper.to_array(tensor)
        if value.dtype == np.float32 and value.ndim == 2:
            rounded = round_rows(value, bits)
            error = float(np.linalg.norm(value - rounded) / np.linalg.norm(value))
            layers.append(QuantizedLayer(tensor.name, bits, 0, error))
            before += value.nbytes
            tensor.CopyFrom(numpy_helper.from_array(rounded, tensor.name))
    graph = f"{name}.ort-cpu.onnx"
    onnx.save_model(
        model, str(folder / graph), save_as_external_data=True, location=weights, size_threshold=INLINE_BYTES
    )
    record = Quantization(name, "rtn", None, 0, tuple(layers), before, before)
    new = dataclasses.replace(entry, file=graph, weights=(weights,))
    variant = Variant("float32", (weights,), {"ort-cpu": new}, quantization=record)
    manifest = bundle.manifest
    return dataclasses.replace(manifest, variants={**manifest.variants, name: variant})


def add_rounded(bundle: Bundle, bits: int, name: str = "rounded") -> Bundle:
    """The bundle with the variant."""
    with BundleExtension(bundle) as extension:
        return extension.commit(write_rounded(extension.bundle, extension.path, bits, name))
