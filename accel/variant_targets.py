"""The targets that a variant's graph can be lowered for, and how each lowered graph is run for comparison."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from accel.errors import InputError
from accel.schema import suggest
from accel.spec import ArchSpec, Kind

if TYPE_CHECKING:
    import onnx_ir as ir

    from accel.manifest import PassReport

DEFAULT = "tensorrt"


class Lowering(Protocol):
    """A package of ``accel.graph.lowering``."""

    VERSION: int

    def lower(
        self, model: ir.Model, arch: ArchSpec, max_positions: int, dtype: ir.DataType
    ) -> tuple[ir.Model, tuple[PassReport, ...]]:
        """The lowered graph and what each pass did."""
        ...


@dataclass(frozen=True)
class Target:
    """One target.

    Attributes:
        name: Of its graphs in a bundle.
        title: In messages.
        lowering: Imports the lowering.
        session: (evaluated graph, arch, rows, capacity, dtype) -> encoder or decoder session over it.
        fp32: Kinds of models that it runs in fp32 too.
    """

    name: str
    title: str
    lowering: Callable[[], Lowering]
    session: Callable[[Any, ArchSpec, int, int, ir.DataType], Any]
    fp32: tuple[Kind, ...]


def _lower_tensorrt() -> Any:
    from accel.graph.lowering import tensorrt

    return tensorrt


def _tensorrt_session(run: Any, arch: ArchSpec, rows: int, capacity: int, dtype: ir.DataType) -> Any:
    from accel.graph.evaluation.sessions import GraphEncoder, PaddedDecoder

    return PaddedDecoder(run, arch, rows, capacity, dtype) if arch.kind == "decoder" else GraphEncoder(run, dtype)


def _lower_ort_cuda() -> Any:
    from accel.graph.lowering import ort_cuda

    return ort_cuda


def _ort_cuda_session(run: Any, arch: ArchSpec, rows: int, capacity: int, dtype: ir.DataType) -> Any:
    from accel.graph.evaluation.sessions import GroupedDecoder, MaskedEncoder

    return GroupedDecoder(run, arch, rows, capacity, dtype) if arch.kind == "decoder" else MaskedEncoder(run, dtype)


def _lower_cuda() -> Any:
    from accel.graph.lowering import cuda

    return cuda


def _cuda_session(run: Any, arch: ArchSpec, rows: int, capacity: int, dtype: ir.DataType) -> Any:
    from accel.graph.evaluation.sessions import GraphEncoder, PackedDecoder

    return PackedDecoder(run, arch, rows, capacity, dtype) if arch.kind == "decoder" else GraphEncoder(run, dtype)


TARGETS: dict[str, Target] = {
    target.name: target
    for target in (
        Target("tensorrt", "TensorRT", _lower_tensorrt, _tensorrt_session, ("encoder", "decoder")),
        Target("cuda", "the cuda engine", _lower_cuda, _cuda_session, ()),
        # Its attention over a cache has no fp32 kernel.
        Target("ort-cuda", "ONNX Runtime CUDA", _lower_ort_cuda, _ort_cuda_session, ("encoder",)),
    )
}


def find_target(name: str) -> Target:
    """The target of a name.

    Raises:
        InputError: There is none.
    """
    if name not in TARGETS:
        raise InputError(f"unknown target {name!r}", where="target", remedy=suggest(name, list(TARGETS)))
    return TARGETS[name]


def sensible_targets(arch: ArchSpec, variant: str) -> tuple[str, ...]:
    """The targets that run a model of this kind in a precision."""
    return tuple(name for name, target in TARGETS.items() if variant != "fp32" or arch.kind in target.fp32)


__all__ = ["DEFAULT", "TARGETS", "Lowering", "Target", "find_target", "sensible_targets"]
