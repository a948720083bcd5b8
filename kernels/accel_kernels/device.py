"""What a kernel may use here: Triton's interpreter, or a GPU and which of its features."""

from __future__ import annotations

import os
from functools import cache
from typing import Any

import torch

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"  # Triton looks when a kernel is defined


@cache
def capability(device: torch.device) -> tuple[int, int]:
    """The GPU's compute capability; that of the newest under the interpreter, which runs everything but
    dependent launches and inline PTX.
    """
    return (9, 0) if INTERPRETED else torch.cuda.get_device_capability(device)


@cache
def shared_memory(device: torch.device) -> int:
    """Bytes of shared memory that one program may take."""
    return 1 << 30 if INTERPRETED else int(torch.cuda.get_device_properties(device).shared_memory_per_block_optin)


@cache
def multiprocessors(device: torch.device) -> int:
    """How many programs of a kernel that stays run at once."""
    return 2 if INTERPRETED else int(torch.cuda.get_device_properties(device).multi_processor_count)


def has_dependent_launch(device: torch.device) -> bool:
    """Whether a kernel may start before its predecessor ends (programmatic dependent launch, SM 90 and later).

    Triton's interpreter has no such thing.
    """
    return not INTERPRETED and capability(device) >= (9, 0)


def has_tensor_memory_access(device: torch.device) -> bool:
    """Whether tiles come and go by descriptor (the tensor memory accelerator, SM 90 and later)."""
    return capability(device) >= (9, 0)


def has_warp_jobs(device: torch.device) -> bool:
    """Whether groups of warps can have programs of their own and multiply together, as SM 90 alone does (WGMMA).

    Triton's interpreter has no such thing.
    """
    return not INTERPRETED and capability(device)[0] == 9


def launch_options(
    device: torch.device, dependent: bool | None, warps: int, stages: int | None = None
) -> dict[str, Any]:
    """The keyword arguments of a launch that do not depend on the op.

    Args:
        dependent: Start before the predecessor ends; None: where the device can.
        stages: Turns of a loop in flight; None: Triton's default.
    """
    dependent = has_dependent_launch(device) if dependent is None else dependent
    # Said aloud, because Triton 3.10 fuses multiplication and addition on request only.
    options: dict[str, Any] = {"DEPENDENT": dependent, "num_warps": warps, "enable_fp_fusion": True}
    if stages is not None:
        options["num_stages"] = stages
    if dependent:
        options["launch_pdl"] = True
    return options


def fitting_stages(device: torch.device, stages: int, turn: int, ahead: int) -> int:
    """At most ``stages``, as many as shared memory holds; at least 1.

    Args:
        turn: Bytes that one turn of the loop keeps there.
        ahead: Bytes of what stands there before the loop.
    """
    # Hopper's tensor cores read a turn from shared memory while all others are under way; elsewhere its registers do.
    spare = 0 if capability(device)[0] == 9 else 1
    room = max(0, shared_memory(device) - ahead - 1024)
    return max(1, min(stages, room // turn + spare))


def next_power_of_2(number: int) -> int:
    """The least power of two that is not below ``number``."""
    return 1 << max(0, number - 1).bit_length()


__all__ = [
    "INTERPRETED",
    "capability",
    "fitting_stages",
    "has_dependent_launch",
    "has_tensor_memory_access",
    "has_warp_jobs",
    "launch_options",
    "multiprocessors",
    "next_power_of_2",
    "shared_memory",
]
