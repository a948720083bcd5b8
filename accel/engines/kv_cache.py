"""How many cache positions fit: bytes per token from the architecture against the memory at hand."""

from __future__ import annotations

from dataclasses import dataclass

from accel.bundle import ITEM_BYTES, Bundle
from accel.engines.session import SessionOptions
from accel.errors import BundleError, CapacityError, EngineError, EngineUnavailableError, InputError
from accel.machine import available_memory
from accel.manifest import GraphEntry
from accel.spec import ArchSpec

DEFAULT_MAX_BATCH = 8
DEFAULT_CAPACITY = 4096  # positions; more only when asked for
ROUNDED_BYTES = {"int8": 1.0, "int4": 0.5, "fp8": 1.0}  # of a number in caches that are rounded
_MEMORY_SHARE = 2  # the default takes at most one part in this many of what is available
_GPU_MEMORY = "GPU memory"  # where: nothing that was asked for is to blame
_NOTHING_FITS = "Free memory, or use a smaller model: not one position of one row fits"


@dataclass(frozen=True)
class CacheShape:
    """A decoder cache's size: ``rows`` sequences of ``capacity`` positions each."""

    rows: int
    capacity: int


def bytes_per_token(arch: ArchSpec, item_bytes: float = 4) -> int:
    """Bytes that one position of one row takes in all layers' keys and values together.

    Args:
        arch: The model.
        item_bytes: Of one number; 0.5: two share a byte.
    """
    return int(sum(2 * layer.kv_heads * layer.head_dim * item_bytes for layer in arch.layers))


def cache_item_bytes(arch: ArchSpec, graph: GraphEntry) -> float:
    """Bytes of one number in a graph's caches, as its inputs say: 4, 1, or 0.5 where a byte holds two.

    Raises:
        BundleError: The graph's entry lists no cache.
    """
    spec = next((spec for spec in graph.inputs if spec.name == "past.0.key"), None)
    width = spec.shape[-1] if spec is not None and spec.shape else None
    if spec is None or not isinstance(width, int) or spec.dtype not in ITEM_BYTES:
        what = "The manifest lists no past.0.key of a known type among the graph's inputs"
        raise BundleError(what, where=graph.file, remedy="Export the model again")
    return ITEM_BYTES[spec.dtype] * width / arch.layers[0].head_dim


def cache_kind(arch: ArchSpec, graph: GraphEntry) -> str | None:
    """What a graph's caches hold: ``float32``, ``float16``, ..., ``int8``, ``int4`` or ``fp8``; None: it has none.

    Raises:
        BundleError: The integers' shape is not told.
    """
    dtype = next((spec.dtype for spec in graph.inputs if spec.name == "past.0.key"), None)
    if dtype in ("int8", "uint8"):
        return "int8" if cache_item_bytes(arch, graph) == ROUNDED_BYTES["int8"] else "int4"
    return "fp8" if dtype == "float8_e4m3fn" else dtype


def rounded_cache(bundle: Bundle, variant: str) -> str | None:
    """What a variant's caches hold: ``int8``, ``int4`` or ``fp8``; None: floats of 16 or 32 bits, or it has none.

    Raises:
        BundleError: No such variant.
    """
    kinds = (cache_kind(bundle.manifest.arch, graph) for graph in bundle.variant(variant).graphs.values())
    return next((kind for kind in kinds if kind in ROUNDED_BYTES), None)


def resolve_cache(
    arch: ArchSpec, options: SessionOptions, item_bytes: float = 4, available: int | None = None
) -> CacheShape:
    """Rows and capacity for a decoder: what the caller asked for, checked, or defaults that fit.

    The default capacity is ``arch.max_positions``, at most 4,096 and at most what half of the available
    memory holds for all rows. The cache is committed page by page as it fills, so the default costs
    little until it is used; an explicit capacity must fit when full.

    Args:
        arch: The model.
        options: What was asked for.
        item_bytes: Of one number in the cache; see ``bytes_per_token``.
        available: Bytes at hand; None: this machine's memory.

    Raises:
        InputError: A capacity or max_batch below 1, or no integer.
        CapacityError: The capacity exceeds the model's positions, or the cache cannot fit in memory.
    """
    rows = check_count("max_batch", options.max_batch) or DEFAULT_MAX_BATCH
    asked = check_count("capacity", options.capacity)
    row_bytes = max(1, rows * bytes_per_token(arch, item_bytes))
    memory = available_memory() if available is None else available
    if asked is not None:
        shape = CacheShape(rows, asked)
        _check_asked(arch, shape, item_bytes, memory)
        return shape
    fitting = memory // _MEMORY_SHARE // row_bytes if memory is not None else DEFAULT_CAPACITY
    if fitting < 1:
        most = rows * ((memory or 0) // _MEMORY_SHARE) // row_bytes  # rows of one position
        raise CapacityError(
            f"not one cache position fits: {rows} rows need {row_bytes:,} bytes each position, and half of the "
            f"{memory or 0:,} available bytes is the limit",
            where="max_batch",
            remedy=f"Load with a max_batch of at most {most:,}, or free memory" if most else _NOTHING_FITS,
        )
    return CacheShape(rows, min(arch.max_positions, DEFAULT_CAPACITY, fitting))


def check_count(name: str, value: object) -> int | None:
    """An optional argument that must be an integer of at least 1.

    Raises:
        InputError: It is not.
    """
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise InputError(f"{name} must be an integer of at least 1, not {value!r}", where=name)
    return value


def what_fits(arch: ArchSpec, shape: CacheShape, item_bytes: float, memory: int) -> str:
    """What to ask for in place of a cache that does not fit: a smaller capacity, or a smaller max_batch.

    Args:
        arch: The model.
        shape: What does not fit.
        item_bytes: Of one number in the cache; see ``bytes_per_token``.
        memory: Bytes that the cache may take.
    """
    places = memory // max(1, bytes_per_token(arch, item_bytes))  # positions of one row
    positions, rows = places // shape.rows, places // shape.capacity
    fitting = []
    if positions:
        fitting.append(f"a capacity of at most {positions:,} with max_batch {shape.rows:,}")
    if rows:
        fitting.append(f"a max_batch of at most {rows:,} with capacity {shape.capacity:,}")
    if places and not fitting:
        fitting.append(f"a capacity of at most {places:,} with max_batch 1")
    return f"Ask for {', or for '.join(fitting)}" if fitting else _NOTHING_FITS


def resolve_gpu_cache(arch: ArchSpec, options: SessionOptions, item_bytes: float, room: int | None) -> CacheShape:
    """As ``resolve_cache``, but where nothing was asked for, a GPU that is full is passed over.

    Args:
        arch: The model.
        options: What was asked for.
        item_bytes: Of one number in the cache; see ``bytes_per_token``.
        room: Bytes that the cache may take; None: unknown, the machine's own memory is the measure.

    Raises:
        InputError: A capacity or max_batch below 1, or no integer.
        CapacityError: What was asked for does not fit; says what does.
        EngineUnavailableError: Nothing was asked for, and not one position fits.
    """
    try:
        return resolve_cache(arch, options, item_bytes, room)
    except CapacityError as error:
        if _asked(options):
            raise
        raise EngineUnavailableError(error.what, where=_GPU_MEMORY, remedy=error.remedy) from error


def no_room_for_weights(weights: int, found: str) -> EngineUnavailableError:
    """What to raise where a GPU is too full for a model, whatever is asked of its cache.

    Args:
        weights: Bytes.
        found: How many are free, or how memory ran out.
    """
    remedy = "Close other programs on this GPU, or use a smaller model"
    return EngineUnavailableError(f"{found}; the weights take {weights:,} bytes", where=_GPU_MEMORY, remedy=remedy)


def no_room_for_cache(
    full: EngineError, arch: ArchSpec, options: SessionOptions, shape: CacheShape, item_bytes: float, room: int | None
) -> CapacityError | EngineUnavailableError:
    """What to raise where a GPU's memory ran out at load, though all was counted to fit.

    Args:
        full: How it ran out.
        arch: The model.
        options: What was asked for.
        shape: Of the cache that was tried.
        item_bytes: Of one number in it; see ``bytes_per_token``.
        room: Bytes that a cache may take now; None: unknown.
    """
    remedy = "Ask for a smaller capacity or max_batch"
    if room is not None:  # a count that was wrong once is not trusted for more than half of what failed
        tried = shape.rows * shape.capacity * bytes_per_token(arch, item_bytes)
        remedy = what_fits(arch, shape, item_bytes, min(room, tried // 2))
    if _asked(options):
        return CapacityError(full.what, where="capacity, max_batch", remedy=remedy)
    remedy = f"Close other programs on this GPU. {remedy}"
    return EngineUnavailableError(full.what, where=_GPU_MEMORY, remedy=remedy)


def _asked(options: SessionOptions) -> bool:
    return options.capacity is not None or options.max_batch is not None


def _check_asked(arch: ArchSpec, shape: CacheShape, item_bytes: float, memory: int | None) -> None:
    rows, asked = shape.rows, shape.capacity
    if asked > arch.max_positions:
        raise CapacityError(
            f"capacity {asked:,} exceeds the {arch.max_positions:,} positions that the model covers",
            where="capacity",
            remedy=f"Ask for at most {arch.max_positions:,}",
        )
    taken = rows * asked * bytes_per_token(arch, item_bytes)
    if memory is not None and taken > memory:
        raise CapacityError(
            f"a cache of {rows} rows of {asked:,} positions takes {taken:,} bytes when full, "
            f"but {memory:,} are available",
            where="capacity",
            remedy=what_fits(arch, shape, item_bytes, memory),
        )


__all__ = [
    "ROUNDED_BYTES",
    "CacheShape",
    "bytes_per_token",
    "cache_item_bytes",
    "cache_kind",
    "check_count",
    "no_room_for_cache",
    "no_room_for_weights",
    "resolve_cache",
    "resolve_gpu_cache",
    "rounded_cache",
    "what_fits",
]
