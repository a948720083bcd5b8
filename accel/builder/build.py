"""One graph and its settings -> one plan: parse, repair, prove, build. Nothing is written but a scratch file.

Memory, measured with TensorRT-RTX 1.7.1: the interpreter and the libraries take some 150 MB before anything is built,
and the builder copies the weights up to twice; the mapped weights and the plan take none. What compiling a layer takes
(some 10 MB) and lets go is given back to the system meanwhile, see ``memory``.
"""

from __future__ import annotations

import mmap
import tempfile
import time
from collections.abc import Collection
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO, Any

from accel.builder.memory import PeakMemory, giving_back
from accel.builder.network import NetworkView
from accel.builder.parse import ParsedNetwork, parse, unexpected
from accel.builder.profiles import Profile, check_profiles, input_shapes
from accel.builder.progress import BuildMonitor
from accel.builder.proof import Proof, check, prove
from accel.builder.proof_table import ProofTable
from accel.builder.repair import repair
from accel.builder.source import GraphSource
from accel.engines.tensorrt.adapter import Compatibility, Flavour, Target, load_flavour
from accel.errors import EngineBuildError, EngineProofError, InputError, StorageError
from accel.spec import ArchSpec
from accel.storage import as_storage_error

OPTIMIZATION_LEVELS = range(6)


@dataclass(frozen=True)
class BuildSettings:
    """What makes two engines of one graph differ.

    Attributes:
        target: ``tensorrt`` or ``rtx``.
        sm: SMs that the engine is for, all in one plan; see ``per_sm``.
        profiles: Its optimization profiles, in order.
        capacity: Cache slots of each row; None for encoders.
        dtype: The type of attention and caches that the graph must have, e.g. ``float16``; None: as it comes.
        optimization_level: 0 (fast to build) to 5 (tries most).
        workspace: Bytes of scratch memory that a layer may take; None: the library's default.
        refittable: Whether weights can be replaced later.
        hardware_compatibility: TensorRT only: ``same`` (SM) or ``ampere+`` lets other GPUs run the engine.
    """

    target: Target
    sm: tuple[str, ...]
    profiles: tuple[Profile, ...]
    capacity: int | None = None
    dtype: str | None = None
    optimization_level: int = 3
    workspace: int | None = None
    refittable: bool = False
    hardware_compatibility: Compatibility = "none"


@dataclass(frozen=True)
class BuildFacts:
    """What is known after a build.

    Attributes:
        version: Full version of the library.
        engine_bytes: Size of the plan; ``weight_bytes``: of the graph's weights.
        layers: Layers of the network by type, before the builder fuses them.
        fused_attention: Attention layers that TensorRT runs as one.
        seconds: Of the whole build; ``phases``: of its parts.
        peak_rss_bytes: Largest resident memory while it built, of a process that does nothing else (see
            ``PeakMemory``); None: the system does not say.
        warnings: What the library warned of while building.
    """

    target: str
    version: str
    sm: tuple[str, ...]
    engine_bytes: int
    weight_bytes: int
    layers: dict[str, int]
    fused_attention: int
    seconds: float
    phases: dict[str, float]
    peak_rss_bytes: int | None
    warnings: tuple[str, ...]


@dataclass(frozen=True)
class BuiltPlan:
    """A serialized engine and how it came about.

    Attributes:
        plan: Its bytes, mapped from a scratch file that goes with this object.
        timing_cache: What was timed, for the next build; None where the flavour times nothing.
    """

    plan: memoryview
    facts: BuildFacts
    proof: ProofTable
    timing_cache: bytes | None = None


def per_sm(settings: BuildSettings) -> tuple[BuildSettings, ...]:
    """The settings of one engine for each SM, in place of one engine for all."""
    return tuple(replace(settings, sm=(sm,)) for sm in settings.sm)


def build_plan(
    graph: Path,
    arch: ArchSpec,
    settings: BuildSettings,
    *,
    canonical: Path | None = None,
    weights: Collection[str] | None = None,
    timing_cache: bytes | None = None,
    monitor: BuildMonitor | None = None,
    scratch: Path | None = None,
) -> BuiltPlan:
    """Builds an engine.

    Args:
        graph: A graph lowered for TensorRT; its weights lie beside it.
        arch: Its model.
        canonical: The graph that it was lowered from, for the proof; None: the proof does without.
        weights: Names of the only files beside it that it may read; None: any there.
        timing_cache: From an earlier build; ignored where the flavour times nothing.
        monitor: Hears of the progress and can stop the build. Ctrl-C stops it too.
        scratch: Folder for the plan until it is stored, on a disk with room; None: the system's.

    Raises:
        InputError: A setting or a profile is wrong.
        DependencyError: The package is not there.
        EngineBuildError: An operator is missing (named with its layer), a weight is damaged, the flavour cannot build
            this here, or the build failed.
        EngineProofError: The network is not what the graph says.
        StorageError: The scratch folder is full or cannot be written to.
        KeyboardInterrupt: Ctrl-C, once the library has stopped.
    """
    monitor = monitor or BuildMonitor()
    flavour = load_flavour(settings.target)
    check_settings(settings, flavour)
    started, peak = time.monotonic(), PeakMemory()
    with monitor.interruptible():
        with monitor.phase("Reading the graph"):
            source = GraphSource(graph, settings.capacity, weights)
            check_profiles(settings.profiles, source, arch)
            parsed = parse(flavour, source)
        with monitor.phase("Proving the network"):
            view, table = _prove(parsed, arch, settings, canonical)
        config = _configure(parsed, settings, timing_cache)
        with _Scratch(flavour, scratch) as file:
            _run(parsed, config, monitor, file)
            plan = file.plan()
    monitor.raise_if_stopped()
    facts = BuildFacts(
        target=flavour.target,
        version=flavour.version,
        sm=settings.sm,
        engine_bytes=plan.nbytes,
        weight_bytes=source.weight_bytes,
        layers=view.counts(),
        fused_attention=len(view.of_type("ATTENTION_INPUT")),
        seconds=time.monotonic() - started,
        phases=dict(monitor.seconds),
        peak_rss_bytes=peak.read(),
        warnings=tuple(unexpected(parsed.messages.warnings)),
    )
    return BuiltPlan(plan, facts, table, flavour.timing_cache_of(config))


def check_settings(settings: BuildSettings, flavour: Flavour) -> None:
    """Checks what can be checked without the graph.

    Raises:
        InputError: An unknown SM, level or size.
        EngineBuildError: This cannot be built on this machine.
    """
    flavour.check_sms(settings.sm, settings.hardware_compatibility)
    level, workspace = settings.optimization_level, settings.workspace
    if type(level) is not int or level not in OPTIMIZATION_LEVELS:
        remedy = "Give 0 (fast to build) to 5 (tries most)"
        raise InputError(f"There is no optimization level {level!r}", where="optimization_level", remedy=remedy)
    if workspace is not None and workspace < 1:
        remedy = "Give bytes, e.g. 1 << 30, or leave it out"
        raise InputError(f"The workspace must be at least 1 byte, not {workspace}", where="workspace", remedy=remedy)
    if settings.refittable and (reason := flavour.can_refit()):
        remedy = "Build without refittable=True, or on a machine with a GPU"
        raise EngineBuildError(reason, where="refittable", remedy=remedy)


def _prove(
    parsed: ParsedNetwork, arch: ArchSpec, settings: BuildSettings, canonical: Path | None
) -> tuple[NetworkView, ProofTable]:
    view = NetworkView(parsed.flavour, parsed.network)
    repairs = repair(view)
    table = prove(Proof(view, parsed.source, arch, settings.dtype, canonical), repairs)
    check(table)
    return view, table


def _configure(parsed: ParsedNetwork, settings: BuildSettings, timing_cache: bytes | None) -> Any:
    """The builder's config with everything of the settings in it."""
    flavour, trt, builder = parsed.flavour, parsed.flavour.trt, parsed.builder
    config = builder.create_builder_config()
    config.builder_optimization_level = settings.optimization_level
    flavour.set_workspace(config, settings.workspace)
    flavour.allow_capture(config)
    flavour.set_sms(config, settings.sm, settings.hardware_compatibility)
    if settings.refittable:
        config.set_flag(trt.BuilderFlag.REFIT)
    for profile in settings.profiles:
        made = builder.create_optimization_profile()
        for name, shapes in input_shapes(profile, parsed.source.inputs).items():
            made.set_shape(name, *shapes)
        if config.add_optimization_profile(made) < 0:
            said = " ".join(parsed.messages.errors[-2:]) or "no reason given"
            raise EngineBuildError(
                f"{flavour.title} refused the profile: {said}", where=f"profile {profile.name}", remedy="Change it"
            )
    flavour.load_timing_cache(config, timing_cache or b"")
    return config


def _run(parsed: ParsedNetwork, config: Any, monitor: BuildMonitor, file: _Scratch) -> None:
    native = monitor.native(parsed.flavour.trt)
    config.progress_monitor = native
    with giving_back(parsed.source.drop_pages):
        built = parsed.builder.build_serialized_network_to_stream(parsed.network, config, file.writer)
    monitor.raise_if_stopped()
    file.raise_if_failed()
    errors, warnings = parsed.messages.errors, parsed.messages.warnings
    if not built:
        # Without a GPU the library complains of the driver too, whatever failed.
        reasons = [text for text in errors if "catchCudaError" not in text] or errors or ["no reason given"]
        what = f"{parsed.flavour.title} could not build the engine: {reasons[-1]}"
        remedy = "Try another optimization level, a larger workspace, or smaller profiles"
        raise EngineBuildError(what, where=str(parsed.source.path), remedy=remedy)
    if unused := [text for text in warnings if "Unused Input" in text]:
        remedy = "Remove the input from the graph, or lower the node that reads it"
        raise EngineProofError(f"The builder dropped an input: {unused[0]}", remedy=remedy)


class _Scratch:
    """A nameless file that takes the plan while it is serialized, so that memory holds no second copy."""

    def __init__(self, flavour: Flavour, folder: Path | None) -> None:
        self._flavour, self._folder = flavour, Path(folder or tempfile.gettempdir()).absolute()
        self._error: OSError | None = None

    def __enter__(self) -> _Scratch:
        try:
            self._file: IO[bytes] = tempfile.TemporaryFile(dir=self._folder)
        except OSError as error:
            raise self._in_words(error) from error
        self.writer = self._make_writer()
        return self

    def __exit__(self, *_: object) -> None:
        with suppress(OSError):  # a full disk is reported by raise_if_failed
            self._file.close()

    def _make_writer(self) -> Any:
        scratch, base = self, self._flavour.trt.IStreamWriter

        class Writer(base):  # type: ignore[misc, valid-type]
            def __init__(self) -> None:
                base.__init__(self)

            def write(self, data: bytes) -> int:
                try:
                    return scratch._file.write(data)
                except OSError as error:  # nothing may be raised into the library
                    scratch._error = error
                    return 0

        return Writer()

    def raise_if_failed(self) -> None:
        """Raises:
        StorageError: A write failed.
        """
        try:
            self._file.flush()
        except OSError as error:
            self._error = self._error or error
        if self._error is not None:
            raise self._in_words(self._error) from self._error

    def plan(self) -> memoryview:
        """The file's bytes, mapped; they stay readable after the file is closed."""
        return memoryview(mmap.mmap(self._file.fileno(), 0, access=mmap.ACCESS_READ))

    def _in_words(self, error: OSError) -> StorageError:
        remedy = "Set TMPDIR to a folder with room for the engine"
        said = as_storage_error(error, self._folder, "Set TMPDIR to a path")
        return said or StorageError(f"Cannot write: {error}", where=str(self._folder), remedy=remedy)


__all__ = ["BuildFacts", "BuildSettings", "BuiltPlan", "build_plan", "check_settings", "per_sm"]
