"""All differences between ``tensorrt`` (10.15.1 and later, 11) and ``tensorrt_rtx`` (1.7), behind one ``Flavour``.

What RTX does was measured with 1.7.1. What full TensorRT does is read from its sources at the releases 10.15, 10.16
and 11.1 (github.com/NVIDIA/TensorRT: ``include/NvInfer.h``, ``python/src/infer/*.cpp``); each place says which.
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, get_args
from weakref import WeakSet

from accel.engines.tensorrt.packages import TITLES, current_sm, import_package, release_of
from accel.errors import EngineBuildError, InputError

Target = Literal["tensorrt", "rtx"]
CausalKind = Literal["none", "upper-left", "lower-right"]
Compatibility = Literal["none", "same", "ampere+"]
TARGETS: tuple[Target, ...] = ("tensorrt", "rtx")
_DATA_TYPES = {"float32": "FLOAT", "float16": "HALF", "bfloat16": "BF16", "float8_e4m3fn": "FP8"}


@dataclass(frozen=True)
class LogMessage:
    """One line of the library's log. ``severity``: internal_error, error, warning, info or verbose."""

    severity: str
    text: str


@dataclass(eq=False)  # hashed by identity: loggers hold it weakly
class MessageLog:
    """What the library said, in order; ``minimum`` and worse are kept."""

    minimum: str = "warning"
    messages: list[LogMessage] = field(default_factory=list)

    def of(self, *severities: str) -> list[str]:
        """The texts of the given severities."""
        return [message.text for message in self.messages if message.severity in severities]

    @property
    def errors(self) -> list[str]:
        return self.of("internal_error", "error")

    @property
    def warnings(self) -> list[str]:
        return self.of("warning")


class Flavour(ABC):
    """One of the two packages. Made by ``load_flavour``.

    Attributes:
        target: ``tensorrt`` or ``rtx``.
        trt: The imported module.
        version: Its full version, e.g. ``1.7.1.116``.
    """

    target: ClassVar[Target]
    title: ClassVar[str]  # as a person calls it
    cache_kind: ClassVar[Literal["timing", "runtime"]]  # what makes the second build or the second start fast
    needs_gpu: ClassVar[bool]  # to build
    captures_graphs: ClassVar[bool]  # whether the library can capture CUDA graphs by itself
    float32_sm: ClassVar[int]  # the first whose matrices it multiplies in fp32

    def __init__(self, trt: Any, version: str) -> None:
        self.trt, self.version = trt, version

    @property
    def release(self) -> tuple[int, ...]:
        """The version as numbers."""
        return release_of(self.version)

    # Building

    @abstractmethod
    def known_sms(self) -> tuple[str, ...]:
        """SMs that this flavour can build for here, e.g. ``("sm86", "sm89")``."""

    def check_sms(self, sms: Sequence[str], compatibility: Compatibility = "none") -> None:
        """Checks target SMs before any work.

        Raises:
            InputError: None given, one twice, or one that this flavour does not know.
            EngineBuildError: It cannot be built on this machine.
        """
        known = self.known_sms()
        if not sms:
            raise InputError("No SM is given", where="sm", remedy=f"Name at least one of {', '.join(known)}")
        for sm in sms:
            if not re.fullmatch(r"sm\d{2,3}", sm):
                remedy = f"Write it like sm86; {self.title} knows {', '.join(known) or 'none here'}"
                raise InputError(f"{sm!r} is not the name of an SM", where="sm", remedy=remedy)
        if compatibility not in get_args(Compatibility):
            remedy = f"Choose from {', '.join(get_args(Compatibility))}"
            what = f"There is no hardware compatibility {compatibility!r}"
            raise InputError(what, where="hardware_compatibility", remedy=remedy)
        if len(set(sms)) < len(sms):
            raise InputError(f"An SM stands twice in {', '.join(sms)}", where="sm", remedy="Name each once")
        self._check_known(sms, known, compatibility)

    @abstractmethod
    def _check_known(self, sms: Sequence[str], known: tuple[str, ...], compatibility: Compatibility) -> None: ...

    @abstractmethod
    def set_sms(self, config: Any, sms: Sequence[str], compatibility: Compatibility = "none") -> None:
        """Writes the (checked) target SMs into an ``IBuilderConfig``."""

    def create_network(self, builder: Any) -> Any:
        """A strongly typed network."""
        # "kSTRONGLY_TYPED [...] Deprecated in TensorRT 11.0. Strongly typed mode is always enabled" (NvInfer.h, 11.1);
        # so it is in RTX, whose new network says it has the flag. In 10.x it is a choice.
        return builder.create_network(self._network_flags())

    def _network_flags(self) -> int:
        return 0

    @abstractmethod
    def can_refit(self) -> str | None:
        """Why a refittable engine cannot be built here; None when it can."""

    def set_workspace(self, config: Any, size: int | None) -> None:
        """Limits the scratch memory of layers, in bytes. None: the library's default (RTX: 64 GiB, TensorRT: all)."""
        if size is not None:
            config.set_memory_pool_limit(self.trt.MemoryPoolType.WORKSPACE, size)

    def allow_capture(self, config: Any) -> None:  # noqa: B027
        """Builds an engine whose runs a CUDA graph may hold. Full TensorRT needs nothing for it."""

    @abstractmethod
    def load_timing_cache(self, config: Any, data: bytes) -> bool:
        """Gives a build the timings of earlier ones (empty: none yet); False where the flavour has no such cache."""

    @abstractmethod
    def timing_cache_of(self, config: Any) -> bytes | None:
        """The timings after a build; None where the flavour has no such cache."""

    # Reading a network

    def typed(self, layer: Any) -> Any:
        """The layer as an object of its own class, with that class's attributes.

        ``INetworkDefinition.get_layer`` returns a bare ``ILayer`` in both packages.
        """
        names = {
            "ATTENTION_INPUT": "IAttentionInputLayer",
            "ATTENTION_OUTPUT": "IAttentionOutputLayer",
            "CAST": "ICastLayer",
            "CONCATENATION": "IConcatenationLayer",
            "CONSTANT": "IConstantLayer",
            "DEQUANTIZE": "IDequantizeLayer",
            "ELEMENTWISE": "IElementWiseLayer",
            "FILL": "IFillLayer",
            "GATHER": "IGatherLayer",
            "KV_CACHE_UPDATE": "IKVCacheUpdateLayer",
            "MATRIX_MULTIPLY": "IMatrixMultiplyLayer",
            "NORMALIZATION": "INormalizationLayer",
            "QUANTIZE": "IQuantizeLayer",
            "REDUCE": "IReduceLayer",
            "ROTARY_EMBEDDING": "IRotaryEmbeddingLayer",
            "SHUFFLE": "IShuffleLayer",
            "SLICE": "ISliceLayer",
            "SOFTMAX": "ISoftMaxLayer",
            "UNARY": "IUnaryLayer",
        }
        name = names.get(layer.type.name)
        if name is not None:
            layer.__class__ = getattr(self.trt, name)
        return layer

    def activation_of(self, layer: Any) -> str:
        """``ActivationType`` of an activation layer, e.g. ``SIGMOID``.

        ``typed`` leaves such layers as they are: ``IActivationLayer.type`` hides the layer's own type.
        """
        bare = layer.__class__
        layer.__class__ = self.trt.IActivationLayer
        try:
            return str(layer.type.name)
        finally:
            layer.__class__ = bare

    def causal_kind(self, attention: Any) -> CausalKind:
        """Which causal mask an ``IAttention`` lays over its own mask."""
        # 10.15 and 10.16 have the boolean ``causal`` alone, which means upper left (python/src/infer/pyGraph.cpp).
        if not hasattr(attention, "causal_kind"):
            return "upper-left" if attention.causal else "none"
        kinds: dict[str, CausalKind] = {"NONE": "none", "UPPER_LEFT": "upper-left", "LOWER_RIGHT": "lower-right"}
        return kinds[attention.causal_kind.name]

    def lengths(self, attention: Any) -> tuple[Any, Any]:
        """The query lengths and key/value lengths tensors of an ``IAttention``; None where there is none."""
        # Neither exists before 11 (python/src/infer/pyGraph.cpp of 10.16).
        return getattr(attention, "query_lengths", None), getattr(attention, "key_value_lengths", None)

    def data_type(self, name: str) -> Any:
        """``trt.DataType`` of a NumPy-style name: float32, float16, bfloat16, int64, int32, int8, int4, bool, ..."""
        return getattr(self.trt.DataType, _DATA_TYPES.get(name, name.upper()))

    def dtype_name(self, data_type: Any) -> str:
        """The NumPy-style name of a ``trt.DataType``."""
        names = {ours: name for name, ours in _DATA_TYPES.items()}
        return names.get(data_type.name, data_type.name.lower())

    # Running

    @abstractmethod
    def runtime_config(self, engine: Any, cache: bytes | None = None) -> tuple[Any, Any]:
        """The config for ``engine.create_execution_context(config)``, and the runtime cache in it or None.

        The caller keeps both alive as long as the context: neither holds the other.
        """

    def runtime_cache_of(self, cache: Any) -> bytes | None:
        """What a runtime cache learned, to be stored; None where the flavour has none."""
        return None if cache is None else bytes(memoryview(cache.serialize()))

    def stream_is_capturable(self, context: Any, stream: int) -> bool:
        """Whether a CUDA graph may be captured from the context now, on the given stream handle."""
        return True

    # Logging

    def logger(self, log: MessageLog) -> Any:
        """The process's one ``ILogger`` for builders and runtimes; it appends to ``log`` as long as ``log`` lives.

        Both packages keep the logger of the first builder or runtime and ignore those of later ones, so there is one
        for all: what is built at the same time in other threads is heard too.
        """
        shared = _LOGGERS.setdefault(self.trt.__name__, _collector(self.trt))
        shared.logs.add(log)
        return shared

    def parser_logger(self, log: MessageLog) -> Any:
        """An ``ILogger`` of its own for one ``OnnxParser``, which does use what it is given. Keep it alive with it."""
        own = _collector(self.trt)
        own.logs.add(log)
        return own


_LOGGERS: dict[str, Any] = {}
_SEVERITIES = ("internal_error", "error", "warning", "info", "verbose")


def _collector(trt: Any) -> Any:
    base: Any = trt.ILogger

    class Collector(base):  # type: ignore[misc]
        def __init__(self) -> None:
            base.__init__(self)
            self.logs: WeakSet[MessageLog] = WeakSet()

        def log(self, severity: Any, text: str) -> None:
            name = severity.name.lower()
            for log in list(self.logs):
                if _SEVERITIES.index(name) <= _SEVERITIES.index(log.minimum):
                    log.messages.append(LogMessage(name, text))

    return Collector()


class TensorRT(Flavour):
    """Full TensorRT: builds for the GPU at hand, times kernels while building."""

    target = "tensorrt"
    title = TITLES["tensorrt"]
    cache_kind = "timing"
    needs_gpu = True
    float32_sm = 0  # none that it refuses is known
    captures_graphs = False  # its IRuntimeConfig has the allocation strategy alone (pyCore.cpp, 10.15 to 11.1)

    def known_sms(self) -> tuple[str, ...]:
        return (sm,) if (sm := current_sm()) else ()

    def _check_known(self, sms: Sequence[str], known: tuple[str, ...], compatibility: Compatibility) -> None:
        if not known:
            what = "TensorRT builds engines with the GPU they are for, and there is none here"
            remedy = "Build on a machine with that GPU, or build for TensorRT-RTX (target='rtx'), which needs none"
            raise EngineBuildError(what, where=f"sm {', '.join(sms)}", remedy=remedy)
        if len(sms) > 1 and compatibility != "ampere+":
            remedy = "Name the SM of this machine's GPU alone, or pass hardware_compatibility='ampere+'"
            raise EngineBuildError("A TensorRT engine is for one SM", where=f"sm {', '.join(sms)}", remedy=remedy)
        # kAMPERE_PLUS: "compatible with Ampere and newer GPUs [...] only supported for engines built on NVIDIA Ampere
        # and later GPUs" (NvInfer.h, HardwareCompatibilityLevel).
        portable = compatibility == "ampere+" and all(int(sm[2:]) >= 80 for sm in (*sms, *known))
        if not portable and any(sm not in known for sm in sms):
            what = f"TensorRT builds for the GPU at hand ({known[0]}) only"
            remedy = f"Build on a machine with that GPU, or name {known[0]}"
            raise EngineBuildError(what, where=f"sm {', '.join(sms)}", remedy=remedy)

    def set_sms(self, config: Any, sms: Sequence[str], compatibility: Compatibility = "none") -> None:
        # No setter of SMs stands in python/src/infer/pyCore.cpp (10.15 to 11.1): the current device it is.
        levels = {"none": "NONE", "same": "SAME_COMPUTE_CAPABILITY", "ampere+": "AMPERE_PLUS"}
        config.hardware_compatibility_level = getattr(self.trt.HardwareCompatibilityLevel, levels[compatibility])

    def _network_flags(self) -> int:
        return 0 if self.release[0] >= 11 else 1 << int(self.trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED)

    def can_refit(self) -> str | None:
        return None

    def load_timing_cache(self, config: Any, data: bytes) -> bool:
        cache = config.create_timing_cache(data)
        # ignore_mismatch=False: a cache of another GPU or version is refused, and the build times everything anew.
        if cache is None or not config.set_timing_cache(cache, False):
            empty = config.create_timing_cache(b"")
            return empty is not None and bool(config.set_timing_cache(empty, False))
        return True

    def timing_cache_of(self, config: Any) -> bytes | None:
        cache = config.get_timing_cache()
        return None if cache is None else bytes(memoryview(cache.serialize()))

    def runtime_config(self, engine: Any, cache: bytes | None = None) -> tuple[Any, Any]:
        return engine.create_runtime_config(), None


class TensorRTRTX(Flavour):
    """TensorRT-RTX: builds without a GPU for any SM it knows, compiles kernels when the engine first runs."""

    target = "rtx"
    title = TITLES["rtx"]
    cache_kind = "runtime"
    needs_gpu = False
    captures_graphs = True
    float32_sm = 80  # "Cannot compile operation 'Gemm_13' for Turing (SM75): FP32 GEMM is not supported" [1.7.1]

    def known_sms(self) -> tuple[str, ...]:
        names = self.trt.ComputeCapability.__members__
        return tuple(name.lower() for name in names if name.startswith("SM"))  # the others: NONE, CURRENT

    def _check_known(self, sms: Sequence[str], known: tuple[str, ...], compatibility: Compatibility) -> None:
        for sm in sms:
            if sm not in known:
                remedy = f"It builds for {', '.join(known)}; for other GPUs use target='tensorrt'"
                raise InputError(f"{self.title} {self.version} does not support {sm}", where="sm", remedy=remedy)
        if compatibility != "none":  # "getHardwareCompatibilityLevel() is unsupported in TensorRT-RTX" [1.7.1]
            what = f"{self.title} has no hardware compatibility levels"
            raise InputError(what, where="hardware_compatibility", remedy="Leave it out and name several SMs")

    def set_sms(self, config: Any, sms: Sequence[str], compatibility: Compatibility = "none") -> None:
        config.num_compute_capabilities = len(sms)
        for index, sm in enumerate(sms):
            # False, not an error, when refused; the build would then be for the GPU at hand.
            if not config.set_compute_capability(getattr(self.trt.ComputeCapability, sm.upper()), index):
                raise EngineBuildError(f"{self.title} refused the SM {sm}", where="sm", remedy="Leave it out")

    def allow_capture(self, config: Any) -> None:
        # Release notes of 1.2: capture of a user's stream needs engines that never allocate memory themselves.
        config.set_flag(self.trt.BuilderFlag.REQUIRE_USER_ALLOCATION)

    def can_refit(self) -> str | None:
        # Without a GPU REFIT and STRIP_PLAN end in "graph_jit.cpp:278 CHECK(status == CUDA_SUCCESS)" [1.7.1].
        return None if current_sm() else f"{self.title} prepares refittable weights on a GPU, and there is none here"

    def load_timing_cache(self, config: Any, data: bytes) -> bool:
        # "Timing cache operations are no-ops in TensorRT-RTX", deprecated in 1.2 [its warning].
        return False

    def timing_cache_of(self, config: Any) -> bytes | None:
        return None

    def runtime_config(self, engine: Any, cache: bytes | None = None) -> tuple[Any, Any]:
        config = engine.create_runtime_config()
        kernels = config.create_runtime_cache()
        if cache:  # of another SM, older CUDA or newer library: the library ignores and replaces it
            kernels.deserialize(cache)
        config.set_runtime_cache(kernels)
        return config, kernels

    def stream_is_capturable(self, context: Any, stream: int) -> bool:
        return bool(context.is_stream_capturable(stream))


FLAVOURS: dict[str, type[Flavour]] = {flavour.target: flavour for flavour in (TensorRT, TensorRTRTX)}


def load_flavour(target: str) -> Flavour:
    """Imports one of the two packages.

    Args:
        target: ``tensorrt`` or ``rtx``.

    Raises:
        InputError: Another target.
        DependencyError: The package is missing, too old, or cannot be imported; carries the pip command.
    """
    if target not in FLAVOURS:
        raise InputError(f"There is no target {target!r}", where="target", remedy=f"Targets: {', '.join(TARGETS)}")
    return FLAVOURS[target](*import_package(target))


__all__ = ["CausalKind", "Compatibility", "Flavour", "LogMessage", "MessageLog", "TARGETS", "Target", "load_flavour"]
