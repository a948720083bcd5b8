"""What a test asks of the lock that captures of CUDA graphs are made under."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

from accel.engines.capturing import capturing

DISTURBED = {  # what CUDA says while another thread captures
    "pytorch": "CUDA error: operation not permitted when stream is capturing\nFor debugging",
    "onnxruntime": "CUDA failure 900: operation not permitted when stream is capturing ; GPU=0",
    "legacy stream": "CUDA failure 906: operation would make the legacy stream depend on a capturing blocking stream",
    "arena": "BFCArena: Failed to allocate memory for requested buffer of size 12345",
}


def others_may_capture() -> bool:
    """Whether another thread gets the lock now; it gives it back."""

    def take() -> bool:
        taken = capturing.acquire(blocking=False)
        if taken:
            capturing.release()
        return taken

    with ThreadPoolExecutor(1) as other:
        return other.submit(take).result()


__all__ = ["DISTURBED", "others_may_capture"]
