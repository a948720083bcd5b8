"""Graph file -> TensorRT network: weights by memory map, every message of the parser heard."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from accel.builder.source import GraphSource
from accel.engines.tensorrt.adapter import Flavour, MessageLog
from accel.errors import EngineBuildError, EngineProofError

# Warnings that change nothing, each with the reason. Every other warning of the parser is an error.
HARMLESS: tuple[tuple[re.Pattern[str], str], ...] = (
    (re.compile(r"Make sure input .* has Int64 binding"), "our inputs are int64 on purpose, and bound as such"),
    (re.compile(r"logger passed into .* differs from one already registered"), "the parser's own log is read here"),
)
_UNUSED = re.compile(r"Unused Input: *(\S+)")


@dataclass
class ParsedNetwork:
    """A network and all that must live until it is built: it refers to the weights in ``source``.

    Attributes:
        network: ``INetworkDefinition``.
        messages: What the library says from here on.
    """

    flavour: Flavour
    source: GraphSource
    builder: Any
    network: Any
    parser: Any
    messages: MessageLog
    loggers: tuple[Any, ...]


def parse(flavour: Flavour, source: GraphSource) -> ParsedNetwork:
    """Parses a graph.

    Raises:
        EngineBuildError: TensorRT lacks an operator or refuses a node (named, with its layer), or a weight is damaged.
        EngineProofError: The parser warned, e.g. that it ignores an input.
    """
    trt, built, parsed = flavour.trt, MessageLog(), MessageLog()
    logger, parser_logger = flavour.logger(built), flavour.parser_logger(parsed)
    builder = trt.Builder(logger)
    network = flavour.create_network(builder)
    parser = trt.OnnxParser(network, parser_logger)
    if not parser.load_model_proto(source.proto.SerializeToString(), str(source.path)):
        raise _refusal(parser, source, parsed)
    for name, address, size in source.external():
        if not parser.load_initializer(name, address, size):
            raise EngineBuildError(f"{flavour.title} refused a weight", where=name, remedy=" ".join(parsed.errors))
    if not parser.parse_model_proto():
        raise _refusal(parser, source, parsed)
    _check_warnings(parsed, source)
    return ParsedNetwork(flavour, source, builder, network, parser, built, (logger, parser_logger))


def unexpected(warnings: list[str]) -> list[str]:
    """The warnings that are not known to be harmless."""
    return [text for text in warnings if not any(pattern.search(text) for pattern, _ in HARMLESS)]


def _check_warnings(log: MessageLog, source: GraphSource) -> None:
    found = [*unexpected(log.warnings), *log.errors]
    if not found:
        return
    if ignored := [match[1] for text in found if (match := _UNUSED.search(text))]:
        readers = [node.name for node in source.proto.graph.node if set(ignored) & set(node.input)]
        where = f"node {readers[0]}, {source.layer_of(readers[0])}" if readers else str(source.path)
        what = f"The parser ignores the input {ignored[0]}"
        raise EngineProofError(what, where=where, remedy="Lower the node without it, e.g. as part of the mask")
    remedy = "Lower the graph without what it complains about"
    raise EngineProofError(f"The parser warned: {found[0]}", where=str(source.path), remedy=remedy)


def _refusal(parser: Any, source: GraphSource, log: MessageLog) -> EngineBuildError:
    """The parser's first error in words."""
    if parser.num_errors == 0:
        said = " ".join(log.errors) or "no reason given"
        return EngineBuildError(f"The graph cannot be read: {said}", where=str(source.path), remedy="Export it again")
    error = parser.get_error(0)
    name, op = error.node_name(), error.node_operator()
    if not op:  # about the whole model, e.g. its opset
        return EngineBuildError(error.desc(), where=str(source.path), remedy="Export the bundle again")
    what = f"TensorRT cannot take the operator {op}: {_brief(error.desc())}"
    remedy = "Lower it to operators that TensorRT has, or run this model on another engine (engine='ort-cpu')"
    return EngineBuildError(what, where=f"node {name}, {source.layer_of(_outer(name, source))}", remedy=remedy)


def _outer(name: str, source: GraphSource) -> str:
    """The node of the main graph that holds a node of a subgraph."""
    if name in source.nodes:
        return name
    for node in source.proto.graph.node:
        for attribute in node.attribute:
            if any(inner.name == name for inner in attribute.g.node):
                return str(node.name)
    return name


def _brief(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return " ".join(lines)[:300].rstrip(".")


__all__ = ["HARMLESS", "ParsedNetwork", "parse", "unexpected"]
