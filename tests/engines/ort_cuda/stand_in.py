"""Stands in for a GPU: the sessions of ``ort-cuda`` over fp32 graphs on ONNX Runtime's CPU provider."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import onnxruntime

from accel.bundle import Bundle
from accel.engines.kv_cache import CacheShape
from accel.engines.ort_cuda.decoder import OrtCudaDecoderSession
from accel.engines.ort_cuda.encoder import OrtCudaEncoderSession
from accel.engines.ort_cuda.provider import Provider

CPU = Provider(onnxruntime, "CPUExecutionProvider", "cpu")


class FaultySession:
    """An ONNX Runtime session whose runs fail as ``fail(binding, options)`` says: it raises, or returns."""

    def __init__(self, session: Any, fail: Callable[[Any, Any], None]) -> None:
        self._session, self._fail = session, fail

    def __getattr__(self, name: str) -> Any:
        return getattr(self._session, name)

    def run_with_iobinding(self, io: Any, options: Any = None) -> None:
        self._fail(io, options)
        self._session.run_with_iobinding(io, options)


@dataclass(frozen=True)
class FakeGpu(Provider):
    """Says that it is a GPU that captures graphs; notes what is opened with capture, and which runs are captured."""

    fail: Callable[[Any, Any], None] = lambda io, options: None
    opened: list[bool] = field(default_factory=list)

    @property
    def is_cuda(self) -> bool:
        return True

    def open(self, graph: Path | bytes, capture: bool = False) -> Any:
        if isinstance(graph, Path):
            self.opened.append(capture)
        return FaultySession(super().open(graph), self.fail)

    def _settings(self, capture: bool) -> str:
        return self.name


def fake_gpu(fail: Callable[[Any, Any], None] = lambda io, options: None) -> FakeGpu:
    return FakeGpu(onnxruntime, "CPUExecutionProvider", "cpu", fail=fail)


def open_decoder(bundle: Bundle, rows: int, capacity: int, provider: Provider = CPU) -> OrtCudaDecoderSession:
    graph = bundle.file(bundle.graph("fp32", "ort-cuda").file)
    return OrtCudaDecoderSession(graph, bundle.manifest, "fp32", provider, CacheShape(rows, capacity))


def open_encoder(bundle: Bundle, provider: Provider = CPU) -> OrtCudaEncoderSession:
    graph = bundle.file(bundle.graph("fp32", "ort-cuda").file)
    return OrtCudaEncoderSession(graph, bundle.manifest.arch, "fp32", provider)
