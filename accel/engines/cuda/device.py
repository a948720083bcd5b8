"""The GPU that a session runs on, and its errors in our words."""

from __future__ import annotations

import os
import traceback
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from accel_kernels.device import has_warp_jobs

from accel.engines.capturing import capturing
from accel.engines.gpu_memory import OutOfMemoryError, let_go, says_full
from accel.errors import AccelError, EngineBrokenError

_SMALLER = {  # by where memory ran out
    "decoder step": "Load with a smaller max_batch or capacity, or close other programs on this GPU",
    "encoder run": "Use a smaller batch or shorter inputs, or close other programs on this GPU",
}
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

    def made_current(self) -> AbstractContextManager[Any]:
        """This thread's launches go to the device meanwhile."""
        return torch.cuda.device(self.torch) if self.is_gpu else nullcontext()

    @contextmanager
    def at_work(self, where: str) -> Iterator[None]:
        """The device is made current, and errors are told as ``translated_errors`` does."""
        with translated_errors(where), self.made_current():
            yield

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
            with capturing:
                torch.cuda.empty_cache()

    def synchronize(self) -> None:
        """Waits for what was launched."""
        if self.is_gpu:
            with capturing:
                torch.cuda.synchronize(self.torch)

    def release_failed(self, error: BaseException) -> None:
        """Gives back to the driver what a load that failed still holds; see ``let_go``."""
        let_go(error)
        self.release()


def open_device() -> Device:
    """CUDA's current device; the CPU under Triton's interpreter."""
    return Device(torch.device("cpu") if INTERPRETED else torch.device("cuda", torch.cuda.current_device()))


@contextmanager
def translated_errors(where: str) -> Iterator[None]:
    """Turns what PyTorch and Triton raise into our errors.

    Raises:
        OutOfMemoryError: The device's memory is full.
        EngineBrokenError: Anything else: the device's state is unknown then.
    """
    try:
        yield
    except AccelError:
        raise
    except Exception as error:
        first = first_line(error)
        if is_full(error):
            traceback.clear_frames(error.__traceback__)  # who keeps the error must not keep the run's memory
            remedy = _SMALLER.get(where, "Close other programs on this GPU")
            raise OutOfMemoryError(f"the GPU's memory is full: {first}", where=where, remedy=remedy) from error
        told = first if first.startswith("CUDA error:") else error  # what follows is how to debug PyTorch
        what = f"the CUDA engine failed: {type(error).__name__}: {told}"
        raise EngineBrokenError(what, where=where, remedy="Load the bundle again, or with another engine") from error


def is_full(error: BaseException) -> bool:
    """Whether the device's memory was full: whoever asks for less may get it."""
    return isinstance(error, torch.cuda.OutOfMemoryError) or says_full(first_line(error))


def first_line(error: BaseException) -> str:
    """What an exception says, without what PyTorch adds for its own developers."""
    return str(error).partition("\n")[0] or type(error).__name__


__all__ = [
    "INTERPRETED",
    "Device",
    "first_line",
    "is_full",
    "open_device",
    "translated_errors",
]
