"""Engines that TensorRT-RTX really builds from tiny models, and what it says about their inputs and outputs."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx_ir as ir

from accel.bundle import Bundle
from accel.engines.tensorrt.adapter import Flavour, MessageLog, load_flavour
from accel.engines.tensorrt.engine import EngineFacts, Shape
from accel.graph.lowering.tensorrt import lower
from accel.graph.save import load_canonical

SM = "sm86"
Range = tuple[Shape, Shape, Shape]
Ranges = dict[str, Range]


@dataclass(frozen=True)
class Tensor:
    """One input or output of the network that was built."""

    name: str
    data_type: Any  # trt.DataType
    shape: Shape
    is_input: bool
    alias: str | None


@dataclass(frozen=True)
class BuiltEngine:
    """A plan, the tensors and profiles of the network and config it was built from, and its graph for ONNX Runtime."""

    plan: bytes
    tensors: tuple[Tensor, ...]
    profiles: tuple[Ranges, ...]
    graph: Path

    def facts(self, **changes: Any) -> EngineFacts:
        """The facts that a store would keep of the plan."""
        names = tuple(f"profile{index}" for index in range(len(self.profiles)))
        known = {"target": "rtx", "version": load_flavour("rtx").version, "sms": (SM,), "size": len(self.plan)}
        return EngineFacts(**{**known, "profiles": names, **changes})


def lowered(bundle: Bundle, dtype: ir.DataType = ir.DataType.FLOAT) -> ir.Model:
    """The bundle's model in TensorRT's dialect."""
    model = ir.external_data.load_to_model(load_canonical(bundle.file("canonical.onnx")))
    arch = bundle.manifest.arch
    return lower(model, arch, arch.max_positions, dtype)[0]


def decoder_ranges(bundle: Bundle, capacity: int, rows: Range, width: Range, logits: int = 32) -> Ranges:
    """One decoder profile from least, best and largest batch and sequence, given as one-number shapes."""
    sizes = [(b, s) for (b,), (s,) in zip(rows, width)]
    past = {
        f"past.{index}.{part}": _three((b, layer.kv_heads, capacity, layer.head_dim) for b, _ in sizes)
        for index, layer in enumerate(bundle.manifest.arch.layers)
        for part in ("key", "value")
    }
    most = max(sizes[2][0], logits)
    return {
        "input_ids": _three(sizes), "position_ids": _three(sizes), "write_index": _three((b,) for b, _ in sizes),
        "logits_positions": ((1,), (min(sizes[1][0], most),), (most,)), **past,
    }  # fmt: skip


def encoder_ranges(names: list[str], rows: Range, width: Range) -> Ranges:
    """One encoder profile."""
    return {name: _three((b, s) for (b,), (s,) in zip(rows, width)) for name in names}


def _three(shapes: Any) -> Range:
    low, best, high = shapes
    return low, best, high


def build(model: ir.Model, folder: Path, profiles: list[Ranges], capacity: int | None = None) -> BuiltEngine:
    """Builds the engine for ``SM``, and reads its tensors off the network that the parser made."""
    graph = folder / "graph.onnx"
    ir.save(model, graph)
    fixed = model.clone()
    for value in [*fixed.graph.inputs, *fixed.graph.outputs]:
        if "." in (value.name or "") and capacity is not None:
            assert value.shape is not None
            value.shape = ir.Shape([capacity if dim == "C" else dim for dim in value.shape])
    flavour, log = load_flavour("rtx"), MessageLog()
    logger = flavour.logger(log)
    builder, network = _parse(flavour, logger, ir.to_proto(fixed).SerializeToString())
    config = builder.create_builder_config()
    flavour.set_sms(config, [SM])
    taken = []
    for ranges in profiles:
        profile = builder.create_optimization_profile()
        for name, (low, best, high) in ranges.items():
            profile.set_shape(name, low, best, high)
        assert config.add_optimization_profile(profile) >= 0
        taken.append({name: _three(tuple(shape) for shape in profile.get_shape(name)) for name in ranges})
    plan = builder.build_serialized_network(network, config)
    assert plan is not None, log.errors
    return BuiltEngine(bytes(memoryview(plan)), tuple(read_tensors(network)), tuple(taken), graph)


def _parse(flavour: Flavour, logger: Any, proto: bytes) -> tuple[Any, Any]:
    trt = flavour.trt
    builder = trt.Builder(logger)
    network = flavour.create_network(builder)
    parser = trt.OnnxParser(network, logger)
    assert parser.parse(proto), [parser.get_error(index).desc() for index in range(parser.num_errors)]
    for layer in (network.get_layer(index) for index in range(network.num_layers)):
        if layer.type == trt.LayerType.ATTENTION_INPUT:  # float32 attention has no kernel of its own
            flavour.typed(layer).attention.decomposable = True
    return builder, network


def read_tensors(network: Any) -> list[Tensor]:
    aliases = {}
    for layer in (network.get_layer(index) for index in range(network.num_layers)):
        if layer.type.name == "KV_CACHE_UPDATE":
            aliases[layer.get_output(0).name] = layer.get_input(0).name
    inputs = [network.get_input(index) for index in range(network.num_inputs)]
    outputs = [network.get_output(index) for index in range(network.num_outputs)]
    return [
        *(Tensor(tensor.name, tensor.dtype, tuple(tensor.shape), True, None) for tensor in inputs),
        *(Tensor(t.name, t.dtype, tuple(t.shape), False, aliases.get(t.name)) for t in outputs),
    ]
