"""Graph file -> engine: parse, repair, prove, build."""

from __future__ import annotations

import resource
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from accel.builder.parse import ParsedNetwork, parse_graph
from accel.builder.profiles import Profiles, check_profiles, expand
from accel.builder.progress import BuildProgress, Phase
from accel.builder.proof import ProofTable, prove
from accel.builder.repair import repair
from accel.engines.tensorrt.adapter import Compatibility, Flavour
from accel.errors import EngineBuildError, InputError
from accel.manifest import GraphEntry
from accel.spec import ArchSpec

MAX_LEVEL = 5


@dataclass(frozen=True)
class BuildSettings:
    """Everything that changes an engine besides its graph and weights.

    Attributes:
        sms: Target SMs, e.g. ``("sm86", "sm89")``; several make one engine for all of them (RTX).
        profiles: By name.
        max_batch: Most rows.
        capacity: Cache positions per row; None for encoders.
        optimization_level: 0 to 5, the builder's effort; None: its default.
        workspace: Bytes of scratch memory for layers; None: the library's default.
        refittable: Keep weights replaceable.
        hardware_compatibility: ``none``, or ``ampere+`` (TensorRT alone).
    """

    sms: tuple[str, ...]
    profiles: Profiles
    max_batch: int
    capacity: int | None = None
    optimization_level: int | None = None
    workspace: int | None = None
    refittable: bool = False
    hardware_compatibility: Compatibility = "none"


@dataclass
class BuiltPlan:
    """A serialized engine.

    Attributes:
        plan: Its bytes, in the library's own memory.
        facts: What was measured: sizes, layers, seconds; for a manifest.
        proof: What was proved of the network.
        timing_cache: To be given to the next build; None where the flavour has none.
    """

    plan: Any
    facts: dict[str, Any]
    proof: ProofTable
    timing_cache: bytes | None = None
    _alive: list[Any] = field(default_factory=list, repr=False)

    @property
    def view(self) -> memoryview:
        """The plan's bytes, not copied."""
        return memoryview(self.plan)


def build_plan(
    flavour: Flavour,
    path: Path,
    entry: GraphEntry,
    arch: ArchSpec,
    dtype: str,
    settings: BuildSettings,
    *,
    timing_cache: bytes = b"",
    progress: BuildProgress | None = None,
    notify: Callable[[Phase], None] | None = None,
) -> BuiltPlan:
    """Builds one engine.

    Args:
        flavour: The library.
        path: The lowered graph, its weight files beside it.
        entry: Its inputs and outputs.
        arch: The model's.
        dtype: The variant's: float32, float16 or bfloat16.
        settings: What to build.
        timing_cache: Of earlier builds.
        progress: Follows the build; entered by the caller. None: nothing is shown.
        notify: Called with each phase, when ``progress`` is None.

    Raises:
        InputError: Settings that cannot be.
        EngineBuildError: This machine, the graph or the library refuse.
        EngineProofError: The network is not what the graph says.
        KeyboardInterrupt: Ctrl-C, or ``progress.cancel()``.
    """
    check_settings(flavour, arch, settings)
    progress = progress or BuildProgress(arch.architecture, show=False, notify=notify)
    parsed = parse_graph(flavour, path, settings.capacity)
    repaired = repair(parsed)
    proof = prove(parsed, arch, dtype)
    config = _configure(parsed, entry, settings, timing_cache)
    monitor = progress.monitor(flavour)
    config.progress_monitor = monitor
    parsed.log.messages.clear()
    plan = parsed.builder.build_serialized_network(parsed.network, config)
    progress.check()
    if plan is None:
        raise _failed(parsed, settings)
    facts = {
        **_facts(parsed, entry, settings),
        "repaired": repaired,
        "proved": len(proof.rows),
        "engine_bytes": memoryview(plan).nbytes,
        "seconds": round(progress.seconds, 3),
    }
    return BuiltPlan(plan, facts, proof, flavour.timing_cache_of(config), [parsed, config, monitor])


def check_settings(flavour: Flavour, arch: ArchSpec, settings: BuildSettings) -> None:
    """Checks settings before any work. Raises InputError and EngineBuildError as ``build_plan``."""
    level = settings.optimization_level
    if level is not None and (isinstance(level, bool) or not isinstance(level, int) or not 0 <= level <= MAX_LEVEL):
        raise InputError(f"optimization_level must be 0 to {MAX_LEVEL}, not {level!r}", where="optimization_level")
    if settings.workspace is not None and settings.workspace < 1:
        raise InputError(f"workspace must be at least 1 byte, not {settings.workspace}", where="workspace")
    if (settings.capacity is None) != (arch.kind == "encoder"):
        raise InputError("a decoder's engine has a capacity, an encoder's has none", where="capacity")
    if settings.capacity is not None and not 1 <= settings.capacity <= arch.max_positions:
        what = f"capacity must be 1 to the model's {arch.max_positions:,} positions, not {settings.capacity:,}"
        raise InputError(what, where="capacity")
    check_profiles(settings.profiles, arch, settings.capacity, settings.max_batch)
    flavour.check_sms(settings.sms, settings.hardware_compatibility)
    reason = flavour.can_refit() if settings.refittable else None
    if reason is not None:
        raise EngineBuildError(reason, where="refittable", remedy="Build with refittable=False")


def _configure(parsed: ParsedNetwork, entry: GraphEntry, settings: BuildSettings, timing_cache: bytes) -> Any:
    flavour, trt = parsed.flavour, parsed.flavour.trt
    config = parsed.builder.create_builder_config()
    flavour.set_sms(config, settings.sms, settings.hardware_compatibility)
    flavour.set_workspace(config, settings.workspace)
    if settings.optimization_level is not None:
        config.builder_optimization_level = settings.optimization_level
    if settings.refittable:
        config.set_flag(trt.BuilderFlag.REFIT)
    flavour.load_timing_cache(config, timing_cache)
    for name, profile in settings.profiles.items():
        made = parsed.builder.create_optimization_profile()
        for tensor, shapes in expand(profile, entry.inputs, settings.capacity).items():
            if made.set_shape(tensor, *shapes) is False:
                raise InputError(f"{tensor} cannot have the shapes {shapes}", where=f"profiles.{name}")
        if config.add_optimization_profile(made) < 0:
            raise EngineBuildError(
                f"{flavour.title} refuses the profile {name} ({profile}): {'; '.join(parsed.log.errors[-2:])}",
                where=f"profiles.{name}",
            )
    return config


def _facts(parsed: ParsedNetwork, entry: GraphEntry, settings: BuildSettings) -> dict[str, Any]:
    """What a runtime and a reader want to know of the engine."""
    layers = Counter(layer.type.name.lower() for layer in parsed.layers())
    return {
        "layers": dict(sorted(layers.items())),
        "fused_attention": layers["attention_input"],
        "cache_updates": layers["kv_cache_update"],
        "weight_bytes": parsed.weight_bytes,
        "peak_rss_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        * (1 if sys.platform == "darwin" else 1024),
        "profiles": {
            name: {"batch": list(profile.batch), "sequence": list(profile.sequence)}
            for name, profile in settings.profiles.items()
        },
        "capacity": settings.capacity,
        "max_batch": settings.max_batch,
        "cache_bytes": _cache_bytes(parsed, settings),
        "inputs": [spec.name for spec in entry.inputs],
    }


def _peak_rss() -> int:
    """Of this process so far, whatever it did before."""
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def _cache_bytes(parsed: ParsedNetwork, settings: BuildSettings) -> int:
    """Device memory that the caches of all rows take."""
    total = 0
    for index in range(parsed.network.num_inputs):
        tensor = parsed.network.get_input(index)
        if tensor.name.startswith("past."):
            _, heads, capacity, dim = tensor.shape
            width = 4 if parsed.flavour.dtype_name(tensor.dtype) == "float32" else 2
            total += settings.max_batch * heads * capacity * dim * width
    return total


def _failed(parsed: ParsedNetwork, settings: BuildSettings) -> EngineBuildError:
    said = "; ".join(parsed.log.errors[:3]) or "it gives no reason"
    return EngineBuildError(
        f"{parsed.flavour.title} {parsed.flavour.version} built no engine: {said}",
        where=f"building for {', '.join(settings.sms)}",
        remedy="Try fewer or narrower profiles, or another precision; the message above is the library's own",
    )


__all__ = ["BuildSettings", "BuiltPlan", "build_plan", "check_settings"]
