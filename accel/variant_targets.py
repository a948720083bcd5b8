"""The targets that a variant's graph can be lowered for, and how each lowered graph is run for comparison."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from accel.errors import InputError
from accel.graph.lowering.versions import VERSIONS
from accel.kv_quantization import KvQuantization
from accel.refusals import NO_CACHE, beside_cache, refusal, with_cache
from accel.schema import suggest
from accel.scheme import Scheme, parse_scheme
from accel.spec import ArchSpec, Kind

if TYPE_CHECKING:
    import onnx_ir as ir

    from accel.manifest import PassReport

CPU, TENSORRT = "ort-cpu", "tensorrt"
DEFAULT = TENSORRT  # of the precisions in floats; integers go to the first target that takes them
Lowered = tuple["ir.Model", tuple["PassReport", ...]]


@dataclass(frozen=True)
class Plan:
    """What a lowering is told besides the graph.

    Attributes:
        scheme: The variant's.
        static_scales: By a weight's name, the calibrated scale of its product's input.
        parameters: The initializers that stand in the bundle's own weight file, if the variant reads that.
        kv: Scales of the caches, if the scheme has integers there.
    """

    scheme: Scheme
    static_scales: Mapping[str, float] = field(default_factory=dict)
    parameters: frozenset[str] = frozenset()
    kv: KvQuantization | None = None


class Lowering(Protocol):
    """A package of ``accel.graph.lowering``."""

    def lower(self, model: ir.Model, arch: ArchSpec, max_positions: int, dtype: ir.DataType) -> Lowered:
        """The lowered graph and what each pass did."""
        ...


@dataclass(frozen=True)
class Target:
    """One target.

    Attributes:
        name: Of its graphs in a bundle.
        title: In messages.
        package: Imports the lowering.
        session: (evaluated graph, arch, rows, capacity, dtype) -> encoder or decoder session over it.
        fp32: Kinds of models that it runs in plain fp32 too.
        rounds: Whether its engine rounds by itself: graphs of all its precisions read fp32's own weights, and are
            compared as its engine runs them, for nothing else tells what it rounds.
        usable: Whether its graphs can be made and compared here.
    """

    name: str
    title: str
    package: Callable[[], Any]
    session: Callable[[Any, ArchSpec, int, int, ir.DataType], Any]
    fp32: tuple[Kind, ...] = ()
    rounds: bool = False
    usable: Callable[[], bool] = lambda: True

    @property
    def version(self) -> int:
        """Of the lowering."""
        return VERSIONS[self.name]

    def refuses(self, kind: Kind, scheme: Scheme) -> str | None:
        """Why it has no graph for models of a kind in a scheme, or None."""
        return refusal(self.name, kind, scheme)

    def lower(self, model: ir.Model, arch: ArchSpec, plan: Plan, dtype: ir.DataType | None = None) -> Lowered:
        """The lowered graph and what each pass did; ``model`` stays as it is.

        Args:
            model: The canonical graph.
            arch: Its model's.
            plan: What is to be made of it.
            dtype: Of what a GPU computes in floats; None: as the plan's scheme says.
        """
        package = self.package()
        if self.name == CPU:
            return package.lower(
                model, arch, arch.max_positions, plan.parameters, scheme=plan.scheme,
                static_scales=plan.static_scales, kv=plan.kv,
            )  # fmt: skip
        dtype = dtype or float_type(plan.scheme)
        if self.name == TENSORRT:
            scheme, scales = plan.scheme, plan.static_scales
            return package.lower(model, arch, arch.max_positions, dtype, scheme=scheme, static_scales=scales)
        if plan.kv is not None:
            return package.lower(model, arch, arch.max_positions, dtype, kv=plan.kv)
        return package.lower(model, arch, arch.max_positions, dtype)


def float_type(scheme: Scheme) -> ir.DataType:
    """The type that a GPU's graph computes in where nothing is rounded."""
    import onnx_ir as ir

    types = {"fp32": ir.DataType.FLOAT, "fp16": ir.DataType.FLOAT16, "bf16": ir.DataType.BFLOAT16}
    return types[scheme.gpu_base]


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


def _lower_ort_cpu() -> Any:
    from accel.graph.lowering import ort_cpu

    return ort_cpu


def _no_session(run: Any, arch: ArchSpec, rows: int, capacity: int, dtype: ir.DataType) -> Any:
    raise AssertionError("its graphs run in their engine")


def _lower_openvino() -> Any:
    from accel.graph.lowering import openvino

    return openvino


def _has_openvino() -> bool:
    from accel.engines.openvino.package import is_installed

    return is_installed()


TARGETS: dict[str, Target] = {
    target.name: target
    for target in (
        Target(CPU, "ONNX Runtime CPU", _lower_ort_cpu, _no_session),
        Target(TENSORRT, "TensorRT", _lower_tensorrt, _tensorrt_session, ("encoder", "decoder")),
        Target("cuda", "the cuda engine", _lower_cuda, _cuda_session),
        # Its attention over a cache has no fp32 kernel.
        Target("ort-cuda", "ONNX Runtime CUDA", _lower_ort_cuda, _ort_cuda_session, ("encoder",)),
        Target(
            "openvino", "OpenVINO", _lower_openvino, _no_session, ("encoder",),
            rounds=True, usable=_has_openvino,
        ),
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
    """The targets that run a model of this kind in a scheme, and whose graphs can be made here.

    Raises:
        InputError: No such scheme.
    """
    return _able(arch.kind, parse_scheme(variant))


def check_runnable(kind: Kind, variant: str, bundle: Path | None = None) -> None:
    """Refuses a scheme that no target runs for a kind of models.

    Args:
        bundle: What the commands are for that are advised; None: there is none yet.

    Raises:
        InputError: No such scheme, or no target runs it; says why each does not, or what keeps them all from it.
    """
    scheme = parse_scheme(variant)
    if _able(kind, scheme):
        return
    reasons = {target.title: target.refuses(kind, scheme) for target in TARGETS.values()}
    told = "; ".join(f"{title}: {reason}" for title, reason in reasons.items() if reason)
    parts = "Take the parts that one target runs: accel's README lists the schemes of each"
    remedy = "; ".join(_with_cache(kind, scheme, (), bundle)) or parts
    if set(reasons.values()) == {NO_CACHE}:
        told, remedy = NO_CACHE, _without_cache(kind, variant)
    raise InputError(f"no target runs this {kind} as {variant} ({told})", where="variant", remedy=remedy)


def default_targets(arch: ArchSpec, variant: str, bundle: Path | None = None) -> tuple[str, ...]:
    """The targets of a variant that are meant where none is named: the first where something is rounded, else all.

    Each target stores integers in a layout of its own, and choosing them, or a cache's scales, takes its time.

    Args:
        bundle: As ``check_runnable``.

    Raises:
        InputError: No such scheme, or no target runs this kind of model in it; says why each does not.
    """
    check_runnable(arch.kind, variant, bundle)
    able = sensible_targets(arch, variant)
    scheme = parse_scheme(variant)
    return able[:1] if scheme.quantized or scheme.kv_bits is not None else able


def check_target(arch: ArchSpec, scheme: Scheme, target: Target, bundle: Path | None = None) -> None:
    """Refuses what the target cannot run, before anything is made.

    Args:
        bundle: What the command is for that adds what the target runs instead.

    Raises:
        InputError: It cannot; lists the targets that can, and the schemes of this one.
    """
    reason = target.refuses(arch.kind, scheme)
    if reason is None:
        return
    able, alone = sensible_targets(arch, scheme.name), _is_cache_alone(scheme)
    told = [f"Targets that can: {', '.join(able)}"] if able else []
    told += _with_cache(arch.kind, scheme, able, bundle) if alone or not able else []
    remedy = "; ".join(told) or "No target can"
    if reason == NO_CACHE:
        remedy = _without_cache(arch.kind, scheme.name)
    elif alone:
        for name in beside_cache(target.name, arch.kind, scheme)[:1]:
            command = f"accel quantize {bundle or 'BUNDLE'} --variant {name} --target {target.name}"
            remedy = f"{command}; {scheme.name} runs on {', '.join(able)}" if able else command
    what = f"{target.title} cannot run this {arch.kind} as {scheme.name}: {reason}"
    raise InputError(what, where="target", remedy=remedy)


def _is_cache_alone(scheme: Scheme) -> bool:
    """Whether no precision was named beside the cache: there may be one that goes with it."""
    return scheme.base == "fp32" and not scheme.quantized and scheme.kv_bits is not None


def _with_cache(kind: Kind, scheme: Scheme, able: Collection[str], bundle: Path | None) -> list[str]:
    """The targets that refuse a scheme, but keep its cache beside other weights: which, and the command for each."""
    if scheme.kv_bits is None:
        return []
    others = [(name, taken[0]) for name, taken in with_cache(kind, scheme) if name not in able]
    command = f"accel quantize {bundle or 'BUNDLE'} --variant"
    return [f"{name} runs {other}: {command} {other} --target {name}" for name, other in others]


def _without_cache(kind: Kind, variant: str) -> str:
    """What is left of a variant for a model that has no cache."""
    weights = variant.rpartition("+")[0]
    if weights in ("", "fp32"):
        return "Take a variant that rounds weights, or none"
    return f"Take {weights}, which runs on {', '.join(_able(kind, parse_scheme(weights)))}"


def _able(kind: Kind, scheme: Scheme) -> tuple[str, ...]:
    able = [target for target in TARGETS.values() if target.refuses(kind, scheme) is None and target.usable()]
    return tuple(target.name for target in able if not scheme.lossless or kind in target.fp32)


__all__ = [
    "CPU",
    "DEFAULT",
    "TARGETS",
    "TENSORRT",
    "Lowering",
    "Plan",
    "Target",
    "check_runnable",
    "check_target",
    "default_targets",
    "find_target",
    "float_type",
    "sensible_targets",
]
