"""The GPU that a session runs on, and its errors in our words."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from accel_kernels.device import has_warp_jobs

from accel.errors import AccelError, EngineBrokenError, EngineError

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"  # the kernels run on the CPU then, slowly: for tests


@dataclass
class Device:
    """A device and what all recorded runs on it share."""

    torch: torch.device
    pool: Any = field(default=None)

    @property
    def is_gpu(self) -> bool:
        """Whether runs can be recorded and host memory pinned."""
        return self.torch.type == "cuda"

    @property
    def title(self) -> str:
        """As ``EngineInfo.device`` says it."""
        return f"cuda ({torch.cuda.get_device_name(self.torch)})" if self.is_gpu else "cpu, interpreted"

    @property
    def version(self) -> str:
        """Of what computes."""
        import triton

        return f"torch {torch.__version__}, triton {triton.__version__}"

    @property
    def tensor_memory(self) -> bool:
        """Whether tiles can come through the tensor memory accelerator."""
        return self.is_gpu and torch.cuda.get_device_capability(self.torch) >= (9, 0)

    @property
    def warp_jobs(self) -> bool:
        """Whether groups of warps can have programs of their own and multiply together."""
        return self.is_gpu and has_warp_jobs(self.torch)

    def free_memory(self) -> int | None:
        """Bytes that can be had; None: unknown."""
        return torch.cuda.mem_get_info(self.torch)[0] if self.is_gpu else None

    def pinned(self, count: int) -> torch.Tensor:
        """int64 [count] on the host, page-locked where there is a GPU."""
        return torch.zeros(count, dtype=torch.int64, pin_memory=self.is_gpu)

    def event(self) -> Any:
        """Marks a place in the stream."""
        return torch.cuda.Event() if self.is_gpu else None

    def shared_pool(self) -> Any:
        """Memory of all recorded runs: they never run at the same time."""
        if self.pool is None:
            self.pool = torch.cuda.graph_pool_handle()
        return self.pool

    def eviction(self) -> Callable[[], object]:
        """Empties the L2 when it is called, as what other layers read in between does."""
        try:
            size = 2 * torch.cuda.get_device_properties(self.torch).L2_cache_size
            return torch.empty(size, dtype=torch.uint8, device=self.torch).zero_
        except torch.cuda.OutOfMemoryError:
            return lambda: None

    def release(self) -> None:
        """Gives unused memory back to the driver."""
        if self.is_gpu:
            torch.cuda.empty_cache()


def open_device() -> Device:
    """CUDA's current device; the CPU under Triton's interpreter."""
    return Device(torch.device("cpu") if INTERPRETED else torch.device("cuda", torch.cuda.current_device()))


@contextmanager
def translated_errors(where: str) -> Iterator[None]:
    """Turns what PyTorch and Triton raise into our errors.

    Raises:
        EngineError: The device's memory is full.
        EngineBrokenError: Anything else: the device's state is unknown then.
    """
    try:
        yield
    except AccelError:
        raise
    except torch.cuda.OutOfMemoryError as error:
        what = f"the GPU's memory is full: {str(error).splitlines()[0]}"
        raise EngineError(what, where=where, remedy="Load with a smaller max_batch or capacity") from error
    except Exception as error:
        what = f"the CUDA engine failed: {type(error).__name__}: {error}"
        raise EngineBrokenError(what, where=where, remedy="Load the bundle again, or with another engine") from error


__all__ = ["INTERPRETED", "Device", "open_device", "translated_errors"]
