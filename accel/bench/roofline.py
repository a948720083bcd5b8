"""How near each phase and each fused operator of the ``cuda`` engine comes to what the GPU allows."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from accel.bench.cases import Case
from accel.bundle import Bundle

if TYPE_CHECKING:
    from accel.engines.cuda.operator_times import PhaseTimes

ENGINE = "cuda"
_COPY_BYTES, _PRODUCT_SIZE, _TRIES = 1 << 30, 8192, 5


@dataclass(frozen=True)
class GpuLimits:
    """Best of several tries: bytes read and written per second by a copy, operations per second of a product.

    Attributes:
        gpu: Its name.
        dtype: Of the product's matrices.
    """

    gpu: str
    dtype: str
    copy_bytes_s: float
    product_flops_s: float

    def seconds(self, size: float, operations: float) -> float:
        """The roofline: the slower of moving bytes and computing."""
        return max(size / self.copy_bytes_s, operations / self.product_flops_s)


@dataclass(frozen=True)
class Share:
    """A phase or one kind of its operators.

    Attributes:
        phase: Its name.
        operator: The kind's name; empty: the phase as a whole.
        count: Nodes; of a phase: all of them.
        ms: Of all of them in one run.
        limit_ms: The roofline's.
    """

    phase: str
    operator: str
    count: int
    ms: float
    limit_ms: float

    def __str__(self) -> str:
        name = self.phase if not self.operator else f"  {self.count} x {self.operator}"
        return f"{name:44}{self.ms:10.3f}{self.limit_ms:14.3f}{100 * self.limit_ms / self.ms:11.0f}%"


@dataclass(frozen=True)
class Roofline:
    """What was measured on a GPU; ``str()`` gives a table."""

    variant: str
    limits: GpuLimits
    shares: tuple[Share, ...]

    def __str__(self) -> str:
        limits = self.limits
        copying, product = limits.copy_bytes_s / 1e12, limits.product_flops_s / 1e12
        head = f"{ENGINE} {self.variant} on {limits.gpu}: copy {copying:.2f} TB/s, {limits.dtype} {product:.0f} TFLOP/s"
        return "\n".join([head, f"{'':44}{'ms':>10}{'roofline ms':>14}{'reached':>12}", *map(str, self.shares)])


def measure_roofline(bundle: Bundle, variant: str, cases: Sequence[Case], store: str | None = None) -> Roofline:
    """Opens the engine and times its phases: of an encoder each case's forward, of a decoder a prompt and a token of
    one sequence, and, where its case has a batch, of so many at a time too.

    Raises:
        EngineError: The engine cannot be opened, or failed.
    """
    from accel.engines import open_session
    from accel.engines.session import SessionOptions

    case, options = cases[0], SessionOptions(store=store)
    decodes, batch = case.role == "decoder", max(1, case.batch)
    if decodes:
        options = SessionOptions(capacity=case.prompt + case.new + 1, max_batch=batch, store=store)
    session: Any = open_session(bundle, engine=ENGINE, variant=variant, options=options, strict=True).session
    phases: list[PhaseTimes] = []
    try:
        if decodes:
            for rows in dict.fromkeys((1, batch)):
                phases += session.operator_times(rows, max(2, case.prompt), case.prompt + case.new // 2)
        else:
            phases += (session.operator_times(each.batch, each.seq) for each in cases)
    finally:
        session.close()
    limits = measure_gpu_limits(variant)
    return Roofline(variant, limits, tuple(share for phase in phases for share in shares_of(phase, limits)))


def shares_of(phase: PhaseTimes, limits: GpuLimits) -> list[Share]:
    """The phase as a whole, then its operators; the whole's roofline is the operators' together."""
    parts = [
        Share(phase.name, each.name, each.count, 1e3 * each.seconds, 1e3 * limits.seconds(each.bytes, each.flops))
        for each in phase.operators
    ]
    whole = sum(part.limit_ms for part in parts)
    return [Share(phase.name, "", sum(part.count for part in parts), 1e3 * phase.seconds, whole), *parts]


def measure_gpu_limits(variant: str) -> GpuLimits:
    """Measures the current GPU with PyTorch, in the type that a variant computes in: bf16, else fp16."""
    import torch

    dtype = torch.bfloat16 if variant.startswith("bf16") else torch.float16
    source = torch.empty(_COPY_BYTES, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    matrix = torch.randn(_PRODUCT_SIZE, _PRODUCT_SIZE, device="cuda").to(dtype)
    out = torch.empty_like(matrix)
    copying = _best_seconds(lambda: target.copy_(source))
    product = _best_seconds(lambda: torch.mm(matrix, matrix, out=out))
    name = torch.cuda.get_device_name()
    return GpuLimits(name, str(dtype).removeprefix("torch."), 2 * _COPY_BYTES / copying, 2 * _PRODUCT_SIZE**3 / product)


def _best_seconds(run: Callable[[], object]) -> float:
    import torch

    times = []
    for _ in range(_TRIES + 1):  # the first one warms up
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        run()
        stop.record()
        stop.synchronize()
        times.append(start.elapsed_time(stop) / 1e3)
    return float(min(times[1:]))


__all__ = ["ENGINE", "GpuLimits", "Roofline", "Share", "measure_gpu_limits", "measure_roofline", "shares_of"]
