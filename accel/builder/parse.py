"""A lowered graph file -> TensorRT network. Weights are mapped from their files, never copied here."""

from __future__ import annotations

import mmap
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from accel.engines.tensorrt.adapter import Flavour, MessageLog
from accel.errors import EngineBuildError

# Warnings that cost nothing; every other one is an error, because the parser warns where it drops things.
HARMLESS = (
    re.compile(r"Make sure input \S+ has Int64 binding"),  # we bind int64
)


@dataclass
class ParsedNetwork:
    """A parsed network and everything that must outlive it.

    Attributes:
        flavour: The library.
        graph: The ONNX graph without weights, capacity filled in.
        builder, network, parser: The library's.
        log: What it said.
        weight_bytes: Size of the external weights.
    """

    flavour: Flavour
    graph: onnx.GraphProto
    builder: Any
    network: Any
    parser: Any
    log: MessageLog
    logger: Any
    weight_bytes: int
    maps: list[Any] = field(default_factory=list)

    def layers(self) -> list[Any]:
        """The network's layers, each of its own class."""
        return [self.flavour.typed(self.network.get_layer(index)) for index in range(self.network.num_layers)]


def parse_graph(flavour: Flavour, path: Path, capacity: int | None = None) -> ParsedNetwork:
    """Parses a graph of TensorRT's dialect.

    Args:
        flavour: The library to parse with.
        path: The graph; its weight files lie beside it.
        capacity: Number of the dimension ``C``; None for encoders.

    Raises:
        EngineBuildError: TensorRT refuses a node (named with its layer), or warns of something it would drop.
    """
    model = onnx.load(path, load_external_data=False)
    _write_capacity(model.graph, capacity)
    log = MessageLog()
    logger = flavour.logger(log)
    builder = flavour.trt.Builder(logger)
    network = flavour.create_network(builder)
    parser = flavour.trt.OnnxParser(network, logger)
    parsed = ParsedNetwork(flavour, model.graph, builder, network, parser, log, logger, 0)
    if not parser.load_model_proto(model.SerializeToString(), str(path)):
        raise _refused(parsed)
    _feed_weights(parsed, path.parent)
    if not parser.parse_model_proto():
        raise _refused(parsed)
    _check_warnings(parsed)
    return parsed


def _write_capacity(graph: onnx.GraphProto, capacity: int | None) -> None:
    """A dynamic cache length does not parse."""
    for value in [*graph.input, *graph.output]:
        for dimension in value.type.tensor_type.shape.dim:
            if dimension.dim_param == "C":
                assert capacity is not None, "a decoder's graph needs a capacity"
                dimension.dim_value = capacity


def _feed_weights(parsed: ParsedNetwork, folder: Path) -> None:
    """Gives the parser the addresses of the external initializers inside mapped files."""
    bases: dict[str, int] = {}
    for tensor in parsed.graph.initializer:
        if tensor.data_location != onnx.TensorProto.EXTERNAL:
            continue
        entry = {item.key: item.value for item in tensor.external_data}
        name = entry["location"]
        if name not in bases:
            mapped = _map(folder / name)
            parsed.maps.append(mapped)
            bases[name] = mapped.ctypes.data
        size = int(entry["length"])
        parsed.weight_bytes += size
        if not parsed.parser.load_initializer(tensor.name, bases[name] + int(entry.get("offset", 0)), size):
            raise _refused(parsed, f"the weight {tensor.name!r} is refused")


def _map(path: Path) -> np.ndarray:
    with path.open("rb") as stream:
        return np.frombuffer(mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ), np.uint8)


def _refused(parsed: ParsedNetwork, what: str = "the graph is refused") -> EngineBuildError:
    """The parser's first error, with the node and its layer."""
    title = parsed.flavour.title
    if not parsed.parser.num_errors:
        said = "; ".join(parsed.log.errors[:2]) or "it gives no reason"
        return EngineBuildError(f"{title}: {what}: {said}", where="parsing the graph")
    error = parsed.parser.get_error(0)
    name, op = error.node_name() or "?", error.node_operator() or "?"
    layer = re.match(r"layers\.(\d+)\.", name)
    where = f"node {name} ({op})" + (f", layer {layer[1]}" if layer else "")
    return EngineBuildError(
        f"{title} {parsed.flavour.version} does not take the operator {op}: {error.desc()}",
        where=where,
        remedy="Run this model on another engine (ort-cpu), or report the model's configuration",
    )


def _check_warnings(parsed: ParsedNetwork) -> None:
    odd = [text for text in parsed.log.warnings if not any(known.search(text) for known in HARMLESS)]
    if odd or parsed.log.errors:
        what = (odd or parsed.log.errors)[0]
        raise EngineBuildError(
            f"{parsed.flavour.title} warns while parsing, and may have dropped what it warns of: {what}",
            where="parsing the graph",
            remedy="Report the model's configuration and this message",
        )


__all__ = ["HARMLESS", "ParsedNetwork", "parse_graph"]
