"""Opens a session on a plan that is at hand; finding or building the plan is somebody else's."""

from __future__ import annotations

import mmap
from pathlib import Path

from accel.bundle import Bundle
from accel.engines.session import SessionOptions
from accel.engines.tensorrt.adapter import Flavour
from accel.engines.tensorrt.decoder import TrtDecoderSession
from accel.engines.tensorrt.encoder import TrtEncoderSession
from accel.engines.tensorrt.engine import EngineFacts, LoadedEngine, check_facts
from accel.engines.tensorrt.memory import Device, shared_device


def open_tensorrt(
    bundle: Bundle,
    variant: str,
    options: SessionOptions,
    plan: bytes | mmap.mmap | memoryview,
    facts: EngineFacts,
    flavour: Flavour,
    *,
    kernels: Path | None = None,
    device: Device | None = None,
) -> TrtDecoderSession | TrtEncoderSession:
    """Opens a session on a plan.

    Args:
        bundle: What the engine was built from.
        variant: Name of the precision it was built in.
        options: ``max_batch`` and, as the least that is wanted, ``capacity``; ``threads`` means nothing here.
        plan: The serialized engine; not needed once this returns.
        facts: From the manifest that was written with the plan.
        flavour: ``load_flavour(facts.target)``.
        kernels: Where RTX keeps the kernels it compiles; None: nowhere.
        device: None: the process's device for CUDA's current GPU.

    Raises:
        DependencyError: cuda-python is missing.
        EngineUnavailableError: No GPU, or a plan of another flavour, version, SM or bundle, or a damaged one.
        CapacityError: ``max_batch`` or ``capacity`` exceeds what it was built for.
        DeviceMemoryError: The GPU's memory does not hold it.
    """
    device = device or shared_device()
    view = memoryview(plan)
    check_facts(facts, view, flavour, device.sm, bundle)
    engine = LoadedEngine(view, facts, flavour, device, kernels)
    arch = bundle.manifest.arch
    if arch.kind == "encoder":
        command = f"accel build {bundle.path} --target {facts.target} --sm {device.sm} --precision {variant}"
        return TrtEncoderSession(engine, arch, variant, command)
    return TrtDecoderSession(engine, arch, variant, options)


__all__ = ["open_tensorrt"]
